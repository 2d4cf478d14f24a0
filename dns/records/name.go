package records

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// ErrName is wrapped by every complaint about the form of a name.
var ErrName = errors.New("not a usable name")

// ErrDomain says that a name lies outside the domain that this mesh serves.
var ErrDomain = errors.New("does not lie in the mesh's domain")

const (
	maxLabel = 63  // RFC 1035 §2.3.4
	maxName  = 255 // on the wire, length bytes and root included; RFC 1035 §2.3.4
)

// ParseName checks a host name and returns it in lower case with the final dot. Labels hold letters,
// digits, '-' and '_', for these are what container names are made of.
func ParseName(s string) (string, error) {
	name := strings.TrimSuffix(s, ".")
	if name == "" {
		return "", fmt.Errorf("name %q: empty: %w", s, ErrName)
	}
	if len(name)+2 > maxName {
		return "", fmt.Errorf("name %.40q…: %d bytes on the wire, at most %d are possible: %w", s, len(name)+2, maxName, ErrName)
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" {
			return "", fmt.Errorf("name %q: empty label: %w", s, ErrName)
		}
		if len(label) > maxLabel {
			return "", fmt.Errorf("name %q: label of %d bytes, at most %d are possible: %w", s, len(label), maxLabel, ErrName)
		}
		for _, r := range label {
			switch {
			case r > 0x7f:
				return "", fmt.Errorf("name %q: %q is not ASCII (write its punycode form): %w", s, r, ErrName)
			case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_':
			default:
				return "", fmt.Errorf("name %q: %q is not allowed: %w", s, r, ErrName)
			}
		}
	}
	return strings.ToLower(name) + ".", nil
}

// validName reports whether s is what ParseName returns, without building anything.
func validName(s string) bool {
	if len(s) < 2 || len(s)+1 > maxName || s[len(s)-1] != '.' {
		return false
	}
	label := 0
	for i := range len(s) {
		switch c := s[i]; {
		case c == '.':
			if label == 0 || label > maxLabel {
				return false
			}
			label = 0
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
			label++
		default:
			return false
		}
	}
	return true
}

// WireName is a valid name as it stands in a message: length byte before each label, zero at the end.
// Folding a whole wire name to lower case is safe because no length byte (≤ 63) is a letter (≥ 65).
func WireName(name string) string {
	b := make([]byte, 0, len(name)+1)
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		b = append(b, byte(len(label)))
		b = append(b, label...)
	}
	return string(append(b, 0))
}

// inDomain reports whether name lies below domain; both as ParseName returns them.
func inDomain(name, domain string) bool {
	head, ok := strings.CutSuffix(name, domain)
	return ok && len(head) > 1 && head[len(head)-1] == '.'
}

// validAddr reports whether an answer could hold a: an address proper, without zone, and no IPv4 address
// in IPv6 clothes, for that would be a second spelling of the same one.
func validAddr(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified()
}
