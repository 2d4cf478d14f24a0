package fastdp

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"meshd/mesh"
)

// The names in bpf/maps.h, as Go sees the constants behind them. TestLayout compares.
const (
	maxPeers    = 4096
	maxNetworks = 256
	maxPorts    = 4096
	maxForeign  = 131072 - maxPorts // endpoints of other hosts; the rest of the map is for this one's
	maxAddr4    = 16
	maxAddr6    = 8

	configRelay = 1

	peerKnown   = 1
	peerUp      = 2
	peerToV6    = 4
	peerFromV6  = 8
	peerRelayed = 16

	endpointLocal     = 1
	endpointVeth      = 2
	endpointHost      = 4
	endpointAnnounced = 8

	portExempt    = 1
	portAnnounced = 2
)

// macKey is a MAC address as the programs read it: the first byte is the lowest.
func macKey(m mesh.MAC) uint64 {
	var b [8]byte
	copy(b[:], m[:])
	return binary.LittleEndian.Uint64(b[:])
}

func keyMAC(k uint64) (m mesh.MAC) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], k)
	copy(m[:], b[:])
	return m
}

// probeMAC is the address that probes to and from a peer bear, as probe_mac in bpf/packet.h.
func probeMAC(id mesh.ShortID) mesh.MAC {
	return mesh.MAC{0x02, 0x6d, 0x65, 0x73, byte(id >> 8), byte(id)}
}

// wireWords is an address in network byte order, IPv4 in the first word.
func wireWords(a netip.Addr) (w [4]uint32) {
	b := a.AsSlice()
	for i := range len(b) / 4 {
		w[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

func wordsAddr(w [4]uint32, v6 bool) netip.Addr {
	var b [16]byte
	for i, v := range w {
		binary.NativeEndian.PutUint32(b[4*i:], v)
	}
	if v6 {
		return netip.AddrFrom16(b)
	}
	return netip.AddrFrom4([4]byte(b[:4]))
}

// underlayWords is an address as tunnel keys have it: IPv4 in host byte order, IPv6 as on the wire.
func underlayWords(a netip.Addr) (w [4]uint32) {
	if a = a.Unmap(); a.Is4() {
		b := a.As4()
		return [4]uint32{binary.BigEndian.Uint32(b[:])}
	}
	if !a.IsValid() {
		return w
	}
	return wireWords(a)
}

func underlayAddr(w [4]uint32, v6 bool) netip.Addr {
	switch {
	case w == [4]uint32{}:
		return netip.Addr{}
	case v6:
		return wordsAddr(w, true)
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], w[0])
	return netip.AddrFrom4(b)
}

func underlayKey(a netip.Addr) bpfUnderlayKey {
	k := bpfUnderlayKey{Addr: underlayWords(a)}
	if a.Unmap().Is6() {
		k.V6 = 1
	}
	return k
}

// peerValue is a peer's map entry. to is the address to send to; isUp is ignored without one.
func peerValue(p Peer, to netip.Addr, isUp, relayed bool) (v bpfPeer) {
	from := p.Addr.Unmap()
	to = to.Unmap()
	if p.Refuse != "" || p.ID == 0 || !to.IsValid() {
		return v
	}
	v.Flags = peerKnown
	v.To, v.From = underlayWords(to), underlayWords(from)
	if to.Is6() {
		v.Flags |= peerToV6
	}
	if from.Is6() {
		v.Flags |= peerFromV6
	}
	if relayed {
		v.Flags |= peerRelayed
	}
	if isUp {
		v.Flags |= peerUp
	}
	return v
}

// crowdOut takes out of want what goes beyond most endpoints of other hosts, those last that are there already, and returns how
// many. Frames of those go the way of unknown addresses; who announces without end keeps no room from this host's own.
func crowdOut(want, have map[uint64]bpfEndpoint, most int) (out int) {
	foreign := 0
	for _, v := range want {
		if v.Flags&endpointLocal == 0 {
			foreign++
		}
	}
	for _, newcomers := range []bool{true, false} {
		for key, v := range want {
			if foreign <= most {
				return out
			}
			if _, there := have[key]; v.Flags&endpointLocal == 0 && there != newcomers {
				delete(want, key)
				foreign--
				out++
			}
		}
	}
	return out
}

// netset is a set of network numbers.
type netset [maxNetworks / 64]uint64

func (b *netset) set(i int) { b[i/64] |= 1 << (i % 64) }

// networks numbers the networks that have an endpoint on this host. Only they matter: the programs ask
// whether two endpoints share one, and one of the two is always here.
type networks struct {
	number map[netip.Prefix]int
	at     [maxNetworks]netip.Prefix
}

// assign numbers wanted and forgets the others, unless keep says that they stay. A number that is
// forgotten here is given away by a later call at the earliest, when no endpoint bears it any more.
// It returns the networks that found no number.
func (n *networks) assign(wanted map[netip.Prefix]bool, keep bool) (changed bool, left []netip.Prefix) {
	if n.number == nil {
		n.number = make(map[netip.Prefix]int)
	}
	taken := n.at
	if !keep {
		for p, i := range n.number {
			if !wanted[p] {
				delete(n.number, p)
				n.at[i] = netip.Prefix{}
				changed = true
			}
		}
	}
	free := 0
	for _, p := range slices.SortedFunc(maps.Keys(wanted), comparePrefix) {
		if _, ok := n.number[p]; ok {
			continue
		}
		for free < maxNetworks && (taken[free].IsValid() || n.at[free].IsValid()) {
			free++
		}
		if free == maxNetworks {
			left = append(left, p)
			continue
		}
		n.number[p], n.at[free] = free, p
		changed = true
	}
	return changed, left
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// of is the set of the addresses' networks, as far as they are numbered.
func (n *networks) of(addrs []netip.Prefix) (b netset) {
	for _, a := range addrs {
		if i, ok := n.number[a.Masked()]; ok {
			b.set(i)
		}
	}
	return b
}

func networkValue(p netip.Prefix) (v bpfNetwork) {
	if !p.IsValid() {
		return v
	}
	v.Addr = wireWords(p.Addr())
	v.Length = uint16(p.Bits())
	if p.Addr().Is6() {
		v.V6 = 1
	}
	return v
}

func valueNetwork(v bpfNetwork) netip.Prefix {
	if v.Length == 0 {
		return netip.Prefix{}
	}
	p, err := wordsAddr(v.Addr, v.V6 != 0).Prefix(int(v.Length))
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// portValue is a port's map entry.
func portValue(p Port, nets netset, announced bool) (v bpfPort, err error) {
	v.Mac = macKey(p.MAC)
	v.Nets = nets
	if p.Exempt {
		v.Flags |= portExempt
	}
	if announced {
		v.Flags |= portAnnounced
	}
	for _, a := range p.Addrs {
		mask := netip.PrefixFrom(allOnes(a.Addr()), a.Bits()).Masked().Addr()
		if a.Addr().Is4() {
			if v.Count4 == maxAddr4 {
				return v, fmt.Errorf("more than %d IPv4 addresses: %w", maxAddr4, ErrTooMany)
			}
			v.Addr4[v.Count4], v.Mask4[v.Count4] = wireWords(a.Addr())[0], wireWords(mask)[0]
			v.Count4++
		} else {
			if v.Count6 == maxAddr6 {
				return v, fmt.Errorf("more than %d IPv6 addresses: %w", maxAddr6, ErrTooMany)
			}
			v.Addr6[v.Count6], v.Mask6[v.Count6] = wireWords(a.Addr()), wireWords(mask)
			v.Count6++
		}
	}
	return v, nil
}

func allOnes(like netip.Addr) netip.Addr {
	b := like.AsSlice()
	for i := range b {
		b[i] = 0xff
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func validPrefixes(addrs []netip.Prefix) error {
	for _, a := range addrs {
		if !a.IsValid() || a.Addr().Is4In6() || a.Bits() == 0 {
			return fmt.Errorf("address %v: not an address with the length of its subnet", a)
		}
	}
	return nil
}
