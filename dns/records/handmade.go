package records

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"meshd/mesh"
)

// ErrNotAttached says that a name was to be made for a container that no peer has.
var ErrNotAttached = errors.New("not attached to the mesh")

// ErrFull says that the table holds as many hand-made names as it may.
var ErrFull = errors.New("too many names made by hand")

// AddName makes name stand for addrs too. owner is the id of a container that is attached somewhere, and
// then the name shows whenever it is, or mesh.OwnerExtern (also for ""). The record is on disk when
// AddName returns, reaches every peer, and stays until somebody removes it.
func (t *Table) AddName(owner, name string, addrs []netip.Addr) error {
	name, owner, err := t.checkName(owner, name)
	if err != nil {
		return err
	}
	if len(addrs) == 0 {
		return fmt.Errorf("name %q: no address", name)
	}
	recs := make([]*handmade, 0, len(addrs))
	for _, a := range addrs {
		a = a.Unmap()
		if !validAddr(a) {
			return fmt.Errorf("name %q: %v is no address that an answer could hold", name, a)
		}
		recs = append(recs, &handmade{addr: a, owner: owner, name: name})
	}
	t.mu.Lock()
	present := t.ownerPresentLocked(owner)
	t.mu.Unlock()
	if !present {
		return fmt.Errorf("name %q: container %.12s: %w", name, owner, ErrNotAttached)
	}
	return t.write(recs)
}

func (t *Table) checkName(owner, name string) (string, string, error) {
	name, err := ParseName(name)
	if err != nil {
		return "", "", err
	}
	if !inDomain(name, t.domain) {
		return "", "", fmt.Errorf("name %q %w, %s", name, ErrDomain, t.domain)
	}
	if owner == "" {
		owner = mesh.OwnerExtern
	}
	if !validOwner(owner) {
		return "", "", fmt.Errorf("name %q: owner %.40q is not usable", name, owner)
	}
	return name, owner, nil
}

// RemoveName removes the names that match on every count: those of owner ("": whoever), those called name
// ("": however), those that stand for one of addrs (none: whatever). Made by hand they go for all peers;
// names that an endpoint of this peer brought are taken from it. It returns how many records went.
func (t *Table) RemoveName(owner, name string, addrs []netip.Addr) (int, error) {
	if owner == "" && name == "" && len(addrs) == 0 {
		return 0, errors.New("remove names: say which")
	}
	if name != "" {
		var err error
		if name, _, err = t.checkName(owner, name); err != nil {
			return 0, err
		}
	}
	plain := make([]netip.Addr, len(addrs))
	for i, a := range addrs {
		plain[i] = a.Unmap()
	}
	var dead []*handmade
	var trimmed []mesh.Endpoint
	n := 0

	t.mu.Lock()
	for _, r := range t.listed {
		h, ok := r.rec.(*handmade)
		if ok && !h.gone && (owner == "" || h.owner == owner) && (name == "" || h.name == name) &&
			(len(plain) == 0 || slices.Contains(plain, h.addr)) {
			dead = append(dead, &handmade{addr: h.addr, owner: h.owner, name: h.name, gone: true})
		}
	}
	for _, r := range t.peers[t.self].rows {
		e := r.rec.(*endpoint)
		if e.gone || e.part != 0 || owner != "" && e.owner != owner {
			continue
		}
		if len(plain) > 0 && !slices.ContainsFunc(e.addrs, func(p netip.Prefix) bool { return slices.Contains(plain, p.Addr()) }) {
			continue
		}
		ep := t.wholeLocked(e)
		left := slices.DeleteFunc(slices.Clone(ep.Names), func(s string) bool {
			return inDomain(s, t.domain) && (name == "" || s == name)
		})
		if gone := len(ep.Names) - len(left); gone > 0 {
			n += gone
			ep.Names = left
			trimmed = append(trimmed, ep)
		}
	}
	t.mu.Unlock()

	if err := t.write(dead); err != nil {
		return 0, err
	}
	for _, ep := range trimmed {
		t.Announce(ep)
	}
	return n + len(dead), nil
}

// ReleaseOwner removes all names that were made by hand for a container, which is no more.
func (t *Table) ReleaseOwner(owner string) error {
	if isMeshOwner(owner) {
		return nil
	}
	var dead []*handmade
	t.mu.Lock()
	if o := t.owners[owner]; o != nil {
		for _, r := range o.names {
			if h := r.rec.(*handmade); !h.gone {
				dead = append(dead, &handmade{addr: h.addr, owner: h.owner, name: h.name, gone: true})
			}
		}
	}
	t.mu.Unlock()
	return t.write(dead)
}

// write stores records under new versions and then lets them count. What is there already is left alone.
func (t *Table) write(recs []*handmade) error {
	t.edit.Lock()
	defer t.edit.Unlock()

	t.mu.Lock()
	kept := recs[:0]
	room := maxHandmade - t.handmade
	for _, h := range recs {
		r, _ := t.rowLocked(h)
		if r != nil && r.rec.(*handmade).gone == h.gone {
			continue
		}
		if r == nil {
			if room--; room < 0 {
				t.mu.Unlock()
				return ErrFull
			}
		}
		t.signNameLocked(h)
		kept = append(kept, h)
	}
	t.mu.Unlock()
	if len(kept) == 0 {
		return nil
	}

	if t.store != nil {
		kv := make(map[string][]byte, len(kept))
		for _, h := range kept {
			kv[storeKey(h)] = appendRow(nil, h)
		}
		if err := t.store.Put(bucket, kv); err != nil {
			return fmt.Errorf("names: %w", err)
		}
	}

	t.mu.Lock()
	for _, h := range kept {
		// Meanwhile another peer's word may have come in, and be later.
		if r, _ := t.rowLocked(h); r == nil || compareRecords(h, r.rec) > 0 {
			r = t.putLocked(h)
			r.early = t.blank && t.heard.IsZero() && t.now.Sub(t.started) < earlyTime
			t.sendLocked(r)
		}
	}
	t.unlock()
	return nil
}

// signNameLocked makes a record this peer's latest word.
func (t *Table) signNameLocked(h *handmade) {
	t.clock = min(t.clock+1, maxCount) // a larger one would not be read
	h.clock, h.age = t.clock, 0
	h.key, _ = t.keys.Key(t.self)
	t.sealLocked(h)
}

// nameLocked keeps the books when rec takes the place of was (nil: nothing) in row r.
func (t *Table) nameLocked(r *row, was record, rec *handmade) {
	if was == nil {
		t.handmade++
		if !isMeshOwner(rec.owner) {
			o := t.owners[rec.owner]
			if o == nil {
				o = &ownerRows{}
				t.owners[rec.owner] = o
			}
			o.names = append(o.names, r)
		}
	} else if was.(*handmade).gone {
		t.dead--
	}
	r.early = false
	if rec.gone {
		t.dead++
		r.since = t.now.Add(-rec.age)
	}
	t.clock = max(t.clock, rec.clock)
}

// Entry is one name with one address, as status shows it.
type Entry struct {
	Name    string // fully qualified
	Addr    netip.Addr
	Owner   string
	Origin  mesh.PeerName // the peer that has the endpoint, or that wrote the record
	Version uint64
	Hand    bool // made by hand
	Suspect bool
}

// Entries lists what lies in the domain and shows, ordered by name and address.
func (t *Table) Entries() []Entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []Entry
	bearers := map[[32]byte]mesh.PeerName{}
	rows := t.listed
	for _, p := range t.peers {
		if p.hidden {
			rows = append(slices.Clip(rows), p.rows...)
		}
	}
	for _, r := range rows {
		v := t.viewLocked(r)
		e := Entry{Suspect: len(v.names) > 0 && t.suspectLocked(r)}
		switch rec := r.rec.(type) {
		case *endpoint:
			e.Owner, e.Origin, e.Version = rec.owner, rec.peer, rec.ver.seq
		case *handmade:
			if _, ok := bearers[rec.key]; !ok {
				bearers[rec.key] = t.keys.Bearer(rec.key)
			}
			e.Owner, e.Origin, e.Version, e.Hand = rec.owner, bearers[rec.key], rec.clock, true
		}
		for _, e.Name = range v.names {
			for _, e.Addr = range v.addrs {
				all = append(all, e)
			}
		}
	}
	slices.SortFunc(all, func(a, b Entry) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), a.Addr.Compare(b.Addr), cmp.Compare(a.Owner, b.Owner),
			a.Origin.Compare(b.Origin), cmp.Compare(a.Version, b.Version))
	})
	return all
}

// Lookup returns the addresses of a name in the domain, which a single label is taken to be too; those of
// suspected peers come last. It takes no lock.
func (t *Table) Lookup(name string) ([]netip.Addr, error) {
	full, err := ParseName(name)
	if err != nil {
		return nil, err
	}
	if !inDomain(full, t.domain) {
		if strings.Count(full, ".") > 1 {
			return nil, fmt.Errorf("name %q %w, %s", full, ErrDomain, t.domain)
		}
		if full, err = ParseName(full + t.domain); err != nil {
			return nil, err
		}
	}
	a := t.Find([]byte(WireName(full)))
	if a == nil {
		return nil, nil
	}
	var out []netip.Addr
	for i, v := range a.V4 {
		if i < a.Live4 {
			out = append(out, netip.AddrFrom4(v))
		}
	}
	for i, v := range a.V6 {
		if i < a.Live6 {
			out = append(out, netip.AddrFrom16(v))
		}
	}
	for _, v := range a.V4[a.Live4:] {
		out = append(out, netip.AddrFrom4(v))
	}
	for _, v := range a.V6[a.Live6:] {
		out = append(out, netip.AddrFrom16(v))
	}
	return out, nil
}
