package tunnel

import (
	"errors"
	"slices"
	"testing"
)

func TestKeyRing(t *testing.T) {
	a, b := PSK{1}, PSK{2}
	if _, err := (KeyRing)(nil).Add(a); !errors.Is(err, ErrOpenMesh) {
		t.Errorf("first password of an open mesh: got %v, want %v", err, ErrOpenMesh)
	}
	r, err := KeyRing{a}.Add(b)
	if err != nil || !slices.Equal(r, KeyRing{a, b}) {
		t.Fatalf("add: got %v, %v", len(r), err)
	}
	for name, f := range map[string]func() (KeyRing, error){
		"add again":        func() (KeyRing, error) { return r.Add(b) },
		"add none":         func() (KeyRing, error) { return r.Add(PSK{}) },
		"use unknown":      func() (KeyRing, error) { return r.Use("00000000") },
		"remove unknown":   func() (KeyRing, error) { return r.Remove("") },
		"remove the first": func() (KeyRing, error) { return r.Remove(a.ID()) },
	} {
		if _, err := f(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	used, err := r.Use(b.ID())
	if err != nil || !slices.Equal(used, KeyRing{b, a}) || !slices.Equal(r, KeyRing{a, b}) {
		t.Errorf("use: %v", err)
	}
	left, err := used.Remove(a.ID())
	if err != nil || !slices.Equal(left, KeyRing{b}) {
		t.Errorf("remove: %v", err)
	}
	full := KeyRing{a}
	for i := byte(10); len(full) < maxKeys; i++ {
		full = append(full, PSK{i})
	}
	if _, err := full.Add(b); err == nil {
		t.Error("one too many: no error")
	}
}

func FuzzParseKeyRing(f *testing.F) {
	f.Add(KeyRing{{1}, {2}}.Bytes())
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, in []byte) {
		r, err := ParseKeyRing(in)
		if err == nil && !slices.Equal(r.Bytes(), in) {
			t.Errorf("%x became %x", in, r.Bytes())
		}
	})
}
