package proxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// maxDepth bounds the nesting of a body that is decoded; Docker's own have less than ten levels.
const maxDepth = 64

// object is a JSON object whose members keep their order and, unless they are set, their bytes. Names are
// matched as Docker's daemon does (encoding/json): regardless of case. Two names that fold to the same are
// refused, for the daemon would take one and another reader the other.
type object struct {
	names  []string
	values map[string]json.RawMessage // by folded name
}

// parseObject decodes exactly one object and nothing behind it. Member values are kept as they are: deep
// nesting and bytes that are no UTF-8 are refused anywhere in it.
func parseObject(b []byte) (*object, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("not valid UTF-8")
	}
	if err := checkDepth(b); err != nil {
		return nil, err
	}
	if !json.Valid(b) { // once for the whole, so that values need no second look
		var v any
		return nil, json.Unmarshal(b, &v)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	o := &object{values: map[string]json.RawMessage{}}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, err
		}
		name := t.(string) // an object's token here is a name, or Token fails
		if _, ok := o.values[fold(name)]; ok {
			return nil, fmt.Errorf("the member %q stands twice", name)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, err
		}
		o.names = append(o.names, name)
		o.values[fold(name)] = value
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something stands behind the JSON object")
	}
	return o, nil
}

// fold maps names that encoding/json takes for the same to the same: K (U+212A) and ſ (U+017F) are the
// only letters outside ASCII that fold into it.
func fold(name string) string {
	return strings.ToLower(strings.NewReplacer("\u017f", "s", "\u212a", "k").Replace(name))
}

func checkDepth(b []byte) error {
	depth, inString, escaped := 0, false, false
	for _, c := range b {
		switch {
		case escaped:
			escaped = false
		case inString:
			escaped, inString = c == '\\', c != '"'
		case c == '"':
			inString = true
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return fmt.Errorf("nested more than %d levels deep", maxDepth)
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return nil
}

// has reports whether the member exists and is not null.
func (o *object) has(name string) bool {
	v, ok := o.values[fold(name)]
	return ok && string(v) != "null"
}

// get decodes a member into dst and reports whether it is there; null counts as absent.
func (o *object) get(name string, dst any) (bool, error) {
	if !o.has(name) {
		return false, nil
	}
	if err := json.Unmarshal(o.values[fold(name)], dst); err != nil {
		return false, fmt.Errorf("member %q: %w", name, err)
	}
	return true, nil
}

// child decodes a member that is an object; an absent one is empty.
func (o *object) child(name string) (*object, error) {
	if !o.has(name) {
		return &object{values: map[string]json.RawMessage{}}, nil
	}
	c, err := parseObject(o.values[fold(name)])
	if err != nil {
		return nil, fmt.Errorf("member %q: %w", name, err)
	}
	return c, nil
}

// set replaces a member, under its canonical name, or adds it at the end.
func (o *object) set(name string, value any) error {
	var raw json.RawMessage
	if c, ok := value.(*object); ok {
		raw = c.encode()
	} else {
		var buf bytes.Buffer
		enc := json.NewEncoder(&buf)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(value); err != nil {
			return fmt.Errorf("member %q: %w", name, err)
		}
		raw = bytes.TrimSuffix(buf.Bytes(), []byte("\n"))
	}
	if _, ok := o.values[fold(name)]; ok {
		for i, n := range o.names {
			if fold(n) == fold(name) {
				o.names[i] = name
			}
		}
	} else {
		o.names = append(o.names, name)
	}
	o.values[fold(name)] = raw
	return nil
}

// encode writes the members in their order.
func (o *object) encode() []byte {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, n := range o.names {
		if i > 0 {
			b.WriteByte(',')
		}
		key, _ := json.Marshal(n) // a string always encodes
		b.Write(key)
		b.WriteByte(':')
		b.Write(o.values[fold(n)])
	}
	b.WriteByte('}')
	return b.Bytes()
}
