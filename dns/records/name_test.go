package records

import (
	"errors"
	"strings"
	"testing"
)

func TestParseName(t *testing.T) {
	label63 := strings.Repeat("a", 63)
	for _, c := range []struct{ in, want string }{
		{"web.mesh.internal", "web.mesh.internal."},
		{"Web.MESH.internal.", "web.mesh.internal."},
		{"_srv-1.x", "_srv-1.x."},
		{"a", "a."},
		{label63 + ".b", label63 + ".b."},
		{strings.Repeat("a.", 126) + "b", strings.Repeat("a.", 126) + "b."}, // 253 characters, 255 on the wire
		{strings.Repeat("a.", 127) + "b", ""},
		{label63 + "a.b", ""},
		{"", ""}, {".", ""}, {"..", ""}, {"a..b", ""}, {".a", ""},
		{"wéb.mesh.internal", ""}, {"a b", ""}, {"a\\.b", ""}, {"a\x00b", ""}, {"a@b", ""},
	} {
		got, err := ParseName(c.in)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("ParseName(%q) = %q, %v, want %q", c.in, got, err, c.want)
		}
		if err != nil && !errors.Is(err, ErrName) {
			t.Errorf("ParseName(%q): %v is no ErrName", c.in, err)
		}
		if err == nil && !validName(got) {
			t.Errorf("validName(%q) = false", got)
		}
	}
	if _, err := ParseName("wéb.x"); err == nil || !strings.Contains(err.Error(), "ASCII") {
		t.Errorf("got %v, want to hear of ASCII", err)
	}
}

func TestInDomain(t *testing.T) {
	for name, want := range map[string]bool{
		"web.mesh.internal.": true, "a.b.mesh.internal.": true,
		"mesh.internal.": false, "xmesh.internal.": false, ".mesh.internal.": false, "web.mesh.": false,
	} {
		if got := inDomain(name, "mesh.internal."); got != want {
			t.Errorf("inDomain(%q) = %v, want %v", name, got, want)
		}
	}
}

func TestWireName(t *testing.T) {
	if got, want := WireName("web.mesh.internal."), "\x03web\x04mesh\x08internal\x00"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Both judges of a name agree, and what one returns is a fixed point and fits into a message.
func FuzzParseName(f *testing.F) {
	for _, s := range []string{"web.mesh.internal", "A_b-1.", ".", "a..b", "é", string(make([]byte, 300))} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, err := ParseName(s)
		if err != nil {
			if validName(s) {
				t.Errorf("%q is valid and cannot be parsed: %v", s, err)
			}
			return
		}
		again, err := ParseName(name)
		if err != nil || again != name || !validName(name) || len(WireName(name)) > maxName {
			t.Errorf("%q gives %q, that gives %q, %v", s, name, again, err)
		}
	})
}
