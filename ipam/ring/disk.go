package ring

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
)

// On disk every token and every member is a key of its own, so that a change writes little:
//
//	token   key "t" + start in 16 hexadecimal digits     value owner (10), epoch (4), count (4), by (10)
//	member  key "m" + peer and life in hexadecimal        value flags (1), fences (10 each)
//
// A token of nobody, where one is needed to end the one before, has a zero owner and stamp.
const tokenValueSize = idSize + 4 + 4 + idSize

// Changes returns the keys that differ from what was returned before; a nil value is a key to delete.
// Who fails to write them hands them back with Retry.
func (r *Ring) Changes() map[string][]byte {
	if len(r.dirty)+len(r.dirtyIDs) == 0 {
		return nil
	}
	out := make(map[string][]byte, len(r.dirty)+len(r.dirtyIDs))
	for start := range r.dirty {
		key := tokenDiskKey(start)
		out[key] = nil
		if i := r.at(start); r.tokens[i].start == start {
			t := r.tokens[i]
			v := binary.BigEndian.AppendUint32(AppendID(nil, r.ids[t.owner]), t.epoch)
			out[key] = AppendID(binary.BigEndian.AppendUint32(v, t.count), r.ids[t.by])
		}
	}
	for id := range r.dirtyIDs {
		key := "m" + hex.EncodeToString(AppendID(nil, id))
		out[key] = nil
		if m := r.members[id]; m != nil {
			v := []byte{byte(m.Flags)}
			for _, f := range m.Fences {
				v = AppendID(v, f)
			}
			out[key] = v
		}
	}
	clear(r.dirty)
	clear(r.dirtyIDs)
	return out
}

func tokenDiskKey(start uint64) string { return fmt.Sprintf("t%016x", start) }

// Retry marks the keys as not written.
func (r *Ring) Retry(keys map[string][]byte) {
	for k := range keys {
		if start, err := strconv.ParseUint(k[1:], 16, 64); err == nil && k[0] == 't' {
			r.dirty[start] = struct{}{}
		} else if raw, err := hex.DecodeString(k[1:]); err == nil && len(raw) == idSize {
			r.dirtyIDs[ParseID(raw)] = struct{}{}
		}
	}
}

// Load builds the ring that was written key by key.
func Load(rng netip.Prefix, cluster, successor uint64, kv map[string][]byte) (*Ring, error) {
	if err := CheckRange(rng); err != nil {
		return nil, err
	}
	r := New(rng)
	r.cluster, r.successor = cluster, successor
	var tokens []token
	for k, v := range kv {
		switch {
		case len(k) == 17 && k[0] == 't' && len(v) == tokenValueSize:
			start, err := strconv.ParseUint(k[1:], 16, 64)
			if err != nil || start >= r.size {
				return nil, fmt.Errorf("%w: token %q", ErrMalformed, k)
			}
			tokens = append(tokens, token{start, r.intern(ParseID(v)), r.intern(ParseID(v[18:])),
				binary.BigEndian.Uint32(v[10:]), binary.BigEndian.Uint32(v[14:])})
		case len(k) == 1+2*idSize && k[0] == 'm' && len(v)%idSize == 1:
			raw, err := hex.DecodeString(k[1:])
			if err != nil {
				return nil, fmt.Errorf("%w: member %q", ErrMalformed, k)
			}
			m := &Member{ID: ParseID(raw), Flags: Flags(v[0])}
			for f := v[1:]; len(f) > 0; f = f[idSize:] {
				m.Fences = append(m.Fences, ParseID(f))
			}
			r.members[m.ID] = m
		default:
			return nil, fmt.Errorf("%w: key %q", ErrMalformed, k)
		}
	}
	slices.SortFunc(tokens, func(a, b token) int { return int(int64(a.start) - int64(b.start)) })
	if len(tokens) == 0 || tokens[0].start != 0 {
		tokens = slices.Insert(tokens, 0, token{})
	}
	r.tokens = slices.CompactFunc(tokens, token.same)
	for _, t := range r.tokens {
		if t.owner != 0 {
			r.mergeMember(Member{ID: r.ids[t.owner], Flags: Joined})
		}
	}
	r.gen++
	r.memberGen++
	return r, nil
}
