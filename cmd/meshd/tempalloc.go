package main

import (
	"context"
	"errors"
	"net/netip"
	"sync"
)

type tempAlloc struct {
	mu sync.Mutex
	m  map[string][]netip.Prefix
}

func (t *tempAlloc) Allocate(context.Context, string, netip.Prefix) (netip.Prefix, error) {
	return netip.Prefix{}, errors.New("address allocation is off")
}
func (t *tempAlloc) Claim(_ context.Context, owner string, a netip.Prefix) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for o, l := range t.m {
		for _, p := range l {
			if p.Addr() == a.Addr() {
				if o == owner {
					return nil
				}
				return errors.New("address in use by " + o)
			}
		}
	}
	if t.m == nil {
		t.m = map[string][]netip.Prefix{}
	}
	t.m[owner] = append(t.m[owner], a)
	return nil
}
func (t *tempAlloc) Lookup(owner string, s netip.Prefix) (out []netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.m[owner] {
		if !s.IsValid() || s.Contains(p.Addr()) {
			out = append(out, p)
		}
	}
	return
}
func (t *tempAlloc) Release(_ context.Context, owner string, a netip.Addr) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var keep []netip.Prefix
	for _, p := range t.m[owner] {
		if p.Addr() != a {
			keep = append(keep, p)
		}
	}
	t.m[owner] = keep
	return nil
}
func (t *tempAlloc) ReleaseAll(_ context.Context, owner string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.m, owner)
	return nil
}
func (t *tempAlloc) DefaultSubnet() netip.Prefix { return netip.Prefix{} }
