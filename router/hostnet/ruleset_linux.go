package hostnet

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// wish is all that the table depends on.
type wish struct {
	bridge  string
	mac     mesh.MAC // of the bridge
	docker  []string // Docker's bridges
	udp     []uint16 // ports that containers must not reach
	tcp     []uint16
	kernel  uint16 // the kernel path's UDP port, to which only device may send; 0: none
	device  string
	dns     uint16         // port of the name server on Docker's bridges; 0: none
	local   []uint16       // TCP ports on loopback that nobody outside must reach
	within  netip.Prefix   // the address range of the mesh, if known
	exposed []netip.Prefix // subnets, sorted
	masq    []netip.Prefix // those of them that are masqueraded
	keep    []netip.Addr   // of containers here, whose guests keep their source address; sorted
}

// chain is one chain of the table with its rules; hook is nil for one that others jump to.
type chain struct {
	name  string
	kind  nftables.ChainType
	hook  *nftables.ChainHook
	prio  *nftables.ChainPriority
	rules []rule

	// devices are interfaces whose packets go to the chain that bears their name, by the table's only map.
	devices []string
}

// rule is one rule; its text becomes the comment by which a rule is known again.
type rule struct {
	text  string
	exprs []expr.Any
}

// ruleset writes out the table:
//
//	input        tunnel ports and control are closed to containers, loopback ports to everybody else
//	forward      what goes to the bridge passes "tomesh"; nothing of containers goes to other hosts' kernel paths, for
//	             they may write any source address
//	leaving      nothing but the kernel path sends to others' with an address of this host, by which they know this
//	             peer: no local user, and nobody who is masqueraded, whatever program does it. Networks that are
//	             routed as they are go on being so
//	tomesh       no routing from one subnet of the mesh to another (a frame that is bridged bears another
//	             destination MAC than the bridge's), and none from Docker's bridges, replies excepted
//	postrouting  masquerade for exposed subnets, both ways: neither side has a route to the other
//
// Rules that look at connections are there only when something needs them: a single one makes the kernel
// track every packet of the host, the tunnel's included.
func (w wish) ruleset() []chain {
	// The tunnel's own datagrams pass "input" too, every single one: it asks little of what comes from no bridge.
	input := chain{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, prio: nftables.ChainPriorityFilter}
	bridges, closed := chain{name: "bridges"}, chain{name: "closed"}
	input.add("from bridges", inKind("bridge"), jump("bridges"))
	for _, p := range w.local {
		input.add("loopback only", protoPort(unix.IPPROTO_TCP, p), notIn("lo"), within(daddr, netip.MustParsePrefix("127.0.0.0/8"), true), drop())
	}
	for _, name := range append([]string{w.bridge}, w.docker...) {
		bridges.add("closed to containers of "+name, in(name), jump("closed"))
	}
	for _, p := range w.udp {
		closed.add("tunnel port", protoPort(unix.IPPROTO_UDP, p), drop())
	}
	for _, p := range w.tcp {
		closed.add("tunnel or control port", protoPort(unix.IPPROTO_TCP, p), drop())
	}

	forward := chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, prio: nftables.ChainPriorityFilter}
	forward.add("towards the mesh", out(w.bridge), jump("tomesh"))
	for _, name := range append([]string{w.bridge}, w.docker...) {
		if w.kernel != 0 {
			forward.add("to kernel paths from "+name, in(name), notOut(name), protoPort(unix.IPPROTO_UDP, w.kernel), drop())
		}
	}
	leaving := chain{name: "leaving", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPostrouting, prio: nftables.ChainPriorityRef(300)}
	if w.kernel != 0 && w.device != "" {
		leaving.add("to kernel paths in this host's name", protoPort(unix.IPPROTO_UDP, w.kernel), notIn(w.device), fromHere(), drop())
	}
	tomesh := chain{name: "tomesh"}
	if !w.mac.IsZero() {
		tomesh.add("no routing between subnets", in(w.bridge), etherTo(w.mac), drop())
	}
	if len(w.docker) > 0 {
		tomesh.add("replies", established(), accept())
	}
	for _, name := range w.docker {
		tomesh.add("not from "+name, in(name), drop())
	}

	post := chain{name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, prio: nftables.ChainPriorityNATSource}
	if w.within.IsValid() {
		post.add("inside the mesh", within(saddr, w.within, true), within(daddr, w.within, true), ret())
	}
	for _, a := range w.keep {
		post.add("to "+a.String()+" as it is", out(w.bridge), within(daddr, netip.PrefixFrom(a, a.BitLen()), true), ret())
	}
	for _, s := range w.masq {
		if s.Addr().Is4() {
			post.add("multicast from "+s.String(), within(saddr, s, true), within(daddr, netip.MustParsePrefix("224.0.0.0/4"), true), ret())
		} else {
			post.add("multicast from "+s.String(), within(saddr, s, true), within(daddr, netip.MustParsePrefix("ff00::/8"), true), ret())
		}
		post.add("from "+s.String()+" to outside", within(saddr, s, true), within(daddr, s, false), notOut(w.bridge), masquerade())
		post.add("from outside to "+s.String(), out(w.bridge), within(daddr, s, true), within(saddr, s, false), masquerade())
	}
	chains := []chain{closed, bridges, tomesh, input, forward}
	if w.kernel != 0 && w.device != "" {
		chains = append(chains, leaving)
	}
	if len(w.masq) > 0 {
		chains = append(chains, post)
	}
	return chains
}

func (c *chain) add(text string, parts ...[]expr.Any) {
	c.rules = append(c.rules, rule{text, slices.Concat(parts...)})
}

// comment is a rule's user data, which nft shows as its comment.
func (r rule) comment() []byte {
	return userdata.AppendString(nil, userdata.TypeComment, "mesh: "+r.text)
}

func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func onDevice(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: ifname(name)}}
}

func in(name string) []expr.Any     { return onDevice(expr.MetaKeyIIFNAME, expr.CmpOpEq, name) }
func notIn(name string) []expr.Any  { return onDevice(expr.MetaKeyIIFNAME, expr.CmpOpNeq, name) }
func out(name string) []expr.Any    { return onDevice(expr.MetaKeyOIFNAME, expr.CmpOpEq, name) }
func notOut(name string) []expr.Any { return onDevice(expr.MetaKeyOIFNAME, expr.CmpOpNeq, name) }

// metaInputKind asks of what kind the device is that a packet came in by (linux/netfilter/nf_tables.h, since 5.6).
const metaInputKind expr.MetaKey = 26

func inKind(kind string) []expr.Any { return onDevice(metaInputKind, expr.CmpOpEq, kind) }

// protoPort matches the destination port of a transport protocol.
func protoPort(proto byte, port uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}
}

// Which address of a packet.
const (
	saddr = false
	daddr = true
)

// within matches packets of p's family whose source or destination lies in p, or does not.
func within(dst bool, p netip.Prefix, yes bool) []expr.Any {
	family, offset, size := byte(unix.NFPROTO_IPV4), uint32(12), uint32(4) // RFC 791 3.1
	if p.Addr().Is6() {
		family, offset, size = unix.NFPROTO_IPV6, 8, 16 // RFC 8200 3
	}
	if dst {
		offset += size
	}
	op := expr.CmpOpEq
	if !yes {
		op = expr.CmpOpNeq
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: size, Mask: net.CIDRMask(p.Bits(), int(size)*8), Xor: make([]byte, size)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

// etherTo matches frames that came in for this MAC address.
func etherTo(mac mesh.MAC) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFTYPE, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint16(nil, unix.ARPHRD_ETHER)},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: 0, Len: 6},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: mac[:]},
	}
}

// fromHere matches packets that bear an address of this host as their source.
func fromHere() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagSADDR: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)},
	}
}

func established() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Xor: make([]byte, 4),
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func drop() []expr.Any       { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }
func accept() []expr.Any     { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func ret() []expr.Any        { return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} }
func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }
func jump(name string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: name}}
}
