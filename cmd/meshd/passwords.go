package main

import (
	"fmt"
	"runtime/debug"
	"slices"
	"sync"

	"meshd/control"
	"meshd/router/tunnel"
)

const keyPasswords = "passwords" // tunnel.KeyRing, once "meshctl password" has changed it

// passwords is the key ring, which the control API changes.
type passwords struct {
	h *house

	mu   sync.Mutex // guards ring
	ring tunnel.KeyRing
	odd  string // what is wrong with the password given at the start; fixed by load
}

// load takes the ring that "meshctl password" made, else the password given at the start.
func (p *passwords) load(given string) error {
	raw, err := p.h.state.Get(bucketSelf, keyPasswords)
	if err != nil {
		return err
	}
	if given != "" {
		p.ring = tunnel.KeyRing{stretch(given)}
	}
	if raw == nil {
		return nil
	}
	stored, err := tunnel.ParseKeyRing(raw)
	if err != nil {
		return fmt.Errorf("the passwords in the state file: %w", err)
	}
	if len(p.ring) > 0 && !slices.Contains(stored, p.ring[0]) {
		p.odd = fmt.Sprintf("the password given at the start (%s) is not used: \"meshctl password\" chose others; add it there, or give one of those", p.ring[0].ID())
		p.h.log.Warn(p.odd)
	}
	p.ring = stored
	return nil
}

func (p *passwords) any() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ring) > 0
}

// stretch gives back the 128 MiB that stretching takes: nobody needs them again for a long time.
func stretch(password string) tunnel.PSK {
	defer debug.FreeOSMemory()
	return tunnel.Stretch(password)
}

// change puts a changed ring on disk and then into use.
func (p *passwords) change(f func(tunnel.KeyRing) (tunnel.KeyRing, error)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	next, err := f(p.ring)
	if err != nil {
		return err
	}
	if err := p.h.state.Put(bucketSelf, map[string][]byte{keyPasswords: next.Bytes()}); err != nil {
		return fmt.Errorf("store the passwords: %w", err)
	}
	p.ring = next
	p.h.tunnel.SetPSKs(next)
	return nil
}

func (p *passwords) Add(password string) (string, error) {
	psk := stretch(password)
	err := p.change(func(r tunnel.KeyRing) (tunnel.KeyRing, error) { return r.Add(psk) })
	return psk.ID(), err
}

func (p *passwords) Use(id string) error {
	return p.change(func(r tunnel.KeyRing) (tunnel.KeyRing, error) { return r.Use(id) })
}

func (p *passwords) Remove(id string) error {
	return p.change(func(r tunnel.KeyRing) (tunnel.KeyRing, error) { return r.Remove(id) })
}

func (p *passwords) List() []control.Password {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []control.Password
	for i, k := range p.ring {
		out = append(out, control.Password{ID: k.ID(), InUse: i == 0})
	}
	return out
}
