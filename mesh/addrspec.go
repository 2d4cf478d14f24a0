package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// AddrKind says how an address is asked for.
type AddrKind uint8

const (
	AddrExact   AddrKind = iota + 1 // Prefix is the address and the length of its subnet
	AddrSubnet                      // any free address of the subnet Prefix
	AddrDefault                     // any free address of the default subnet
	AddrNone                        // no address: stay off the mesh
)

// AddrSpec is one word of the address grammar that the command line and MESH_CIDR share:
//
//	10.2.1.1/24 or ip:10.2.1.1/24   that address
//	net:10.2.1.0/24                 an address of that subnet
//	net:default                     an address of the default subnet
//	none                            no address; stands alone
//
// IPv6 is written the same way.
type AddrSpec struct {
	Kind   AddrKind
	Prefix netip.Prefix // for AddrExact and AddrSubnet
}

// Limits of the grammar, so that a list from outside stays small.
const (
	maxAddrSpecs    = 64
	maxAddrSpecText = 64 // bytes of one word; the longest valid one has 47
)

// ParseAddrSpec reads one word of the grammar. The error quotes the word and says what is wrong with it.
func ParseAddrSpec(s string) (AddrSpec, error) {
	spec, err := parseAddrSpec(s)
	if err != nil {
		if len(s) > maxAddrSpecText {
			s = s[:maxAddrSpecText]
		}
		return AddrSpec{}, fmt.Errorf("address %q: %w", s, err)
	}
	return spec, nil
}

// ParseAddrSpecs reads words separated by blanks. No words is no error and an empty list, which
// commonly means the default subnet.
func ParseAddrSpecs(s string) ([]AddrSpec, error) {
	words := strings.Fields(s)
	if len(words) > maxAddrSpecs {
		return nil, fmt.Errorf("%d addresses: at most %d at once", len(words), maxAddrSpecs)
	}
	var specs []AddrSpec
	for _, word := range words {
		spec, err := ParseAddrSpec(word)
		if err != nil {
			return nil, err
		}
		if spec.Kind == AddrNone && len(words) > 1 {
			return nil, errors.New(`address "none" stands alone`)
		}
		for _, s := range specs {
			if s.Kind == AddrExact && spec.Kind == AddrExact && s.Prefix.Addr() == spec.Prefix.Addr() && s != spec {
				return nil, fmt.Errorf("address %v stands there with the lengths %d and %d", s.Prefix.Addr(), s.Prefix.Bits(), spec.Prefix.Bits())
			}
		}
		specs = append(specs, spec)
	}
	return specs, nil
}

func (s AddrSpec) String() string {
	switch s.Kind {
	case AddrExact:
		return "ip:" + s.Prefix.String()
	case AddrSubnet:
		return "net:" + s.Prefix.String()
	case AddrDefault:
		return "net:default"
	case AddrNone:
		return "none"
	}
	return "invalid"
}

func parseAddrSpec(s string) (AddrSpec, error) {
	switch s {
	case "":
		return AddrSpec{}, errors.New("empty")
	case "none":
		return AddrSpec{Kind: AddrNone}, nil
	case "net:default":
		return AddrSpec{Kind: AddrDefault}, nil
	}
	if len(s) > maxAddrSpecText {
		return AddrSpec{}, errors.New("too long")
	}
	kind := AddrExact
	if rest, ok := strings.CutPrefix(s, "net:"); ok {
		kind, s = AddrSubnet, rest
	} else {
		s = strings.TrimPrefix(s, "ip:")
	}
	if !strings.Contains(s, "/") {
		return AddrSpec{}, errors.New("the length of the subnet is missing, such as /24")
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return AddrSpec{}, errors.New("not an address with the length of its subnet, such as 10.2.1.1/24")
	}
	if err := CheckSubnet(p); err != nil {
		return AddrSpec{}, err
	}
	if kind == AddrSubnet {
		if p != p.Masked() {
			return AddrSpec{}, fmt.Errorf("has bits set beyond its length; the subnet is net:%v", p.Masked())
		}
		return AddrSpec{Kind: kind, Prefix: p}, nil
	}
	if err := checkHost(p); err != nil {
		return AddrSpec{}, err
	}
	return AddrSpec{Kind: kind, Prefix: p}, nil
}

// CheckSubnet reports why p cannot be a subnet of the mesh, or nil. Host bits are not looked at.
func CheckSubnet(p netip.Prefix) error {
	a := p.Addr()
	switch {
	case !p.IsValid():
		return errors.New("not an address with the length of its subnet")
	case a.Is4In6():
		return errors.New("an IPv4 address is not written as IPv6 here")
	case p.Bits() == 0:
		return errors.New("a subnet of length 0 is the whole world")
	case a.BitLen()-p.Bits() < 2:
		return fmt.Errorf("the smallest subnet has four addresses, a /%d", a.BitLen()-2)
	case a.IsMulticast():
		return errors.New("is a multicast address")
	case a.IsLoopback():
		return errors.New("is a loopback address")
	case a.Is6() && a.IsLinkLocalUnicast():
		return errors.New("is a link-local address, which every interface makes for itself")
	}
	return nil
}

// checkHost reports why the address of p cannot be an interface's.
func checkHost(p netip.Prefix) error {
	a := p.Addr()
	if a.IsUnspecified() {
		return errors.New("is the unspecified address")
	}
	if a == p.Masked().Addr() {
		if a.Is6() { // RFC 4291 2.6.1
			return fmt.Errorf("is the anycast address of all routers of %v", p.Masked())
		}
		return fmt.Errorf("is the network address of %v", p.Masked())
	}
	if a.Is4() && a == LastAddr(p) {
		return fmt.Errorf("is the broadcast address of %v", p.Masked())
	}
	return nil
}

// LastAddr is the highest address of p's subnet: for IPv4, its broadcast address.
func LastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}
