package proxy

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func TestObjectRefuses(t *testing.T) {
	for name, in := range map[string]string{
		"empty":             ``,
		"not an object":     `[]`,
		"null":              `null`,
		"cut off":           `{"a":1`,
		"twice":             `{"a":1,"a":2}`,
		"twice, folded":     `{"HostConfig":{},"hostconfig":{}}`,
		"twice, kelvin":     "{\"Links\":1,\"Lin\u212as\":2}",
		"twice, long s":     "{\"Dns\":1,\"Dn\u017f\":2}",
		"twice, escaped":    `{"a":1,"\u0061":2}`,
		"something behind":  `{} {}`,
		"invalid UTF-8":     "{\"a\":\"\xff\"}",
		"a hundred deep":    strings.Repeat(`{"a":`, 100) + `1` + strings.Repeat(`}`, 100),
		"ten thousand deep": `{"a":` + strings.Repeat(`[`, 10000) + strings.Repeat(`]`, 10000) + `}`,
		"single quotes":     `{'a':1}`,
		"trailing comma":    `{"a":1,}`,
	} {
		if o, err := parseObject([]byte(in)); err == nil {
			t.Errorf("%s: got %s, want an error", name, o.encode())
		}
	}
}

func TestObjectKeepsBytes(t *testing.T) {
	in := `{"z":1e400,"a":12345678901234567890,"é":"\u003c<","HostConfig":{ "b" : [1, 2] },"n":null}`
	o, err := parseObject([]byte(in))
	if err != nil {
		t.Fatal(err)
	}
	if err := o.set("hostconfig", map[string]string{"c": "<"}); err != nil {
		t.Fatal(err)
	}
	if err := o.set("New", 1); err != nil {
		t.Fatal(err)
	}
	want := `{"z":1e400,"a":12345678901234567890,"é":"\u003c<","hostconfig":{"c":"<"},"n":null,"New":1}`
	if got := string(o.encode()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if o.has("n") || !o.has("Z") {
		t.Error("null counts as absent, and names are found regardless of case")
	}
}

// What parses must encode to what encoding/json, as the daemon's decoder, reads the same from.
func FuzzObject(f *testing.F) {
	f.Add([]byte(`{"Image":"a","HostConfig":{"Binds":["x:y"]},"Labels":{"a":"b"}}`))
	f.Add([]byte(`{"a":{"b":[{"c":null}]},"A\u0000":"\ud800"}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		o, err := parseObject(in)
		if err != nil {
			return
		}
		var want, got any
		if err := json.Unmarshal(in, &want); err != nil {
			t.Fatalf("took %q, which encoding/json refuses: %v", in, err)
		}
		out := o.encode()
		if err := json.Unmarshal(out, &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%q became %q", in, out)
		}
		again, err := parseObject(out)
		if err != nil || string(again.encode()) != string(out) {
			t.Fatalf("%q does not survive a second time: %v", out, err)
		}
	})
}
