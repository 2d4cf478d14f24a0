package hostnet

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	netlinkconn "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"meshd/mesh"
)

// FirewallConfig says what the firewall guards. New works on a copy.
type FirewallConfig struct {
	UDPPorts     []uint16 // closed to containers; nil means 6783 and 6784
	KernelPort   uint16   // UDP port of the kernel path, on which nobody else speaks for this host; 0: none
	KernelDevice string   // the kernel path's interface; with KernelPort
	TCPPorts     []uint16 // the same as UDPPorts; nil means 6783; add a control port that listens on TCP
	LocalPorts   []uint16 // TCP ports on loopback, closed to all others; nil means 6782
	DNSPort      uint16   // of the name server on Docker's bridges, opened to containers; 0 means none

	// NoMasqLocal keeps the source address of traffic from outside to containers of this host, which then
	// need a route back. Otherwise it is masqueraded like traffic to those of other hosts.
	NoMasqLocal bool
	Range       netip.Prefix // the mesh's addresses, between which nothing is masqueraded; may be zero
}

const (
	checkEvery  = 500 * time.Millisecond // how often others' changes are looked for
	legacyEvery = 5 * time.Second        // the same for what iptables-legacy has and what its layout does not tell
)

// Firewall keeps the one table of the family inet, and the rules that Docker's FORWARD chain needs beside it, as
// they should be. The rules are applied as one transaction and put back when somebody flushes them.
type Firewall struct {
	host *Host
	cfg  FirewallConfig

	mu      sync.Mutex // guards what follows
	exposed map[netip.Prefix]bool
	guarded []mesh.Port // sorted by host end
	guard   bool        // there is to be a guard at all
	logged  string      // the last error

	apply   sync.Mutex // held while rules are written; taken before mu
	applied []chain    // what was written last
	bridged []chain    // the same for the guard's table
	ipt     iptables
	legacy  atomic.Bool // some rules are in iptables-legacy
}

// NewFirewall prepares a firewall and changes nothing.
func (h *Host) NewFirewall(cfg FirewallConfig) *Firewall {
	if cfg.UDPPorts == nil {
		cfg.UDPPorts = []uint16{6783, 6784}
	}
	if cfg.TCPPorts == nil {
		cfg.TCPPorts = []uint16{6783}
	}
	if cfg.LocalPorts == nil {
		cfg.LocalPorts = []uint16{6782}
	}
	return &Firewall{host: h, cfg: cfg, exposed: map[netip.Prefix]bool{}, ipt: iptables{host: h}}
}

// Expose lets the subnet of p through this host, with other machines as guests or, masqueraded, outside.
func (f *Firewall) Expose(p netip.Prefix, masquerade bool) error {
	if p.Addr().Is4() {
		if err := f.forwardIPv4(); err != nil {
			return err
		}
	}
	f.mu.Lock()
	f.exposed[p] = masquerade
	f.mu.Unlock()
	return f.Apply()
}

// Assume takes what was exposed before a restart as still exposed, and applies nothing yet, so that the
// first Apply does not take rules away that are about to be wanted again.
func (f *Firewall) Assume(exposed map[netip.Prefix]bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.Copy(f.exposed, exposed)
}

// forwardIPv4 makes the host route, as it must for exposed subnets. For IPv6 that is left to people: it
// would make the host deaf to the router advertisements by which it has its own addresses.
func (f *Firewall) forwardIPv4() error {
	return inNamespace(f.host.ns, func() error {
		now, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
		if err == nil && strings.TrimSpace(string(now)) == "1" {
			return nil
		}
		f.host.log.Info("this host now forwards IPv4, for it is exposed")
		return setSysctl("1", "ipv4", "ip_forward")
	})
}

// Hide undoes Expose; for what is not exposed it does nothing.
func (f *Firewall) Hide(p netip.Prefix) error {
	f.mu.Lock()
	delete(f.exposed, p)
	f.mu.Unlock()
	return f.Apply()
}

// Apply writes the rules if they are not there as they should be.
func (f *Firewall) Apply() error {
	f.apply.Lock()
	defer f.apply.Unlock()
	w, err := f.wish()
	if err != nil {
		return err
	}
	want := w.ruleset()
	inet := &nftables.Table{Family: nftables.TableFamilyINet, Name: f.host.cfg.Table}
	var errs []error
	if !reflect.DeepEqual(want, f.applied) || !f.intact(inet, want) {
		f.applied = want
		if err := f.write(inet, want); err != nil {
			f.applied, errs = nil, append(errs, err)
		}
	}
	errs = append(errs, f.applyGuard(true), f.ipt.apply(w))
	f.legacy.Store(f.ipt.legacy())
	return errors.Join(errs...)
}

// Guard makes nftables keep each of these ports to its own MAC address and addresses, which the kernel path
// does where it runs. The ports' addresses have to be those that were given to them, for what a namespace
// says of itself is for the container to change. Another call replaces the list; Unguard ends it.
func (f *Firewall) Guard(ports []mesh.Port) error {
	ports = slices.Clone(ports)
	slices.SortFunc(ports, func(a, b mesh.Port) int { return strings.Compare(a.HostEnd, b.HostEnd) })
	f.mu.Lock()
	f.guarded, f.guard = ports, true
	f.mu.Unlock()
	f.apply.Lock()
	defer f.apply.Unlock()
	return f.applyGuard(false)
}

// Unguard leaves the guarding to others.
func (f *Firewall) Unguard() error {
	f.mu.Lock()
	f.guarded, f.guard = nil, false
	f.mu.Unlock()
	f.apply.Lock()
	defer f.apply.Unlock()
	return f.applyGuard(false)
}

// applyGuard needs the apply lock. Whether others have changed something is looked for on demand. What changes
// in a thousand ports is a few of them, and writing all anew would take seconds.
func (f *Firewall) applyGuard(look bool) error {
	f.mu.Lock()
	ports, guard := f.guarded, f.guard
	f.mu.Unlock()
	t := &nftables.Table{Family: nftables.TableFamilyBridge, Name: f.host.cfg.Table}
	if !guard {
		f.bridged = nil
		return f.delete(t)
	}
	want := guardRules(ports)
	if reflect.DeepEqual(want, f.bridged) && (!look || f.intact(t, want)) {
		return nil
	}
	if look || f.bridged == nil || f.amend(t, f.bridged, want) != nil { // others may have taken away what amend builds on
		if err := f.write(t, want); err != nil {
			return err
		}
	}
	f.bridged = want
	return nil
}

// delete removes a table if it is there.
func (f *Firewall) delete(t *nftables.Table) error {
	c, err := f.conn()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	if found, err := c.ListTableOfFamily(t.Name, t.Family); err != nil || found == nil {
		return nil
	}
	c.DelTable(t)
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("nftables: remove table %s: %w", t.Name, err)
	}
	return nil
}

// wish gathers what the rules depend on.
func (f *Firewall) wish() (wish, error) {
	mac, _, err := f.host.Bridge()
	if err != nil && !errors.Is(err, ErrNoBridge) {
		return wish{}, err
	}
	state, err := f.host.State()
	if err != nil {
		return wish{}, err
	}
	w := wish{
		bridge: f.host.cfg.Bridge, mac: mac, docker: state.Docker, within: f.cfg.Range,
		udp: f.cfg.UDPPorts, tcp: f.cfg.TCPPorts, local: f.cfg.LocalPorts, dns: f.cfg.DNSPort,
		kernel: f.cfg.KernelPort, device: f.cfg.KernelDevice,
	}
	if f.cfg.NoMasqLocal {
		ports, err := f.host.Ports()
		if err != nil {
			return wish{}, err
		}
		for _, p := range ports {
			for _, a := range p.Addrs {
				w.keep = append(w.keep, a.Addr())
			}
		}
		slices.SortFunc(w.keep, netip.Addr.Compare)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for p, masquerade := range f.exposed {
		subnet := p.Masked()
		if !slices.Contains(w.exposed, subnet) {
			w.exposed = append(w.exposed, subnet)
		}
		if masquerade && !slices.Contains(w.masq, subnet) {
			w.masq = append(w.masq, subnet)
		}
	}
	slices.SortFunc(w.exposed, netip.Prefix.Compare)
	slices.SortFunc(w.masq, netip.Prefix.Compare)
	return w, nil
}

// transaction bounds the bytes of one transaction, which is one message to the kernel, and of the answers to it.
// The kernel counts its own overhead, and takes the memory only as it is needed.
const transaction = 256 << 20

func (f *Firewall) conn() (*nftables.Conn, error) {
	return nftables.New(nftables.WithNetNSFd(int(f.host.ns.Fd())), nftables.WithSockOptions(func(c *netlinkconn.Conn) error {
		return errors.Join(c.SetWriteBuffer(transaction), c.SetReadBuffer(transaction))
	}))
}

// write replaces a whole table in one transaction, so that no packet ever meets half of it.
func (f *Firewall) write(t *nftables.Table, want []chain) error {
	c, err := f.conn()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	c.AddTable(t) // so that there is one to delete
	c.DelTable(t)
	c.AddTable(t)
	return f.change(c, t, nil, want)
}

// amend changes a table that is as have says into what want says, in one transaction.
func (f *Firewall) amend(t *nftables.Table, have, want []chain) error {
	c, err := f.conn()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	return f.change(c, t, have, want)
}

// change sends what c holds and the difference between have and want. Chains come before what leads to them, and
// go after it.
func (f *Firewall) change(c *nftables.Conn, t *nftables.Table, have, want []chain) error {
	old, wanted := byName(have), byName(want)
	for _, ch := range want {
		if _, exists := old[ch.name]; !exists {
			c.AddChain(&nftables.Chain{Table: t, Name: ch.name, Type: ch.kind, Hooknum: ch.hook, Priority: ch.prio})
		}
	}
	ports := &nftables.Set{Table: t, Name: "ports", IsMap: true, KeyType: nftables.TypeIFName, DataType: nftables.TypeVerdict}
	for _, ch := range want {
		was, exists := old[ch.name]
		more, less := difference(ch.devices, was.devices), difference(was.devices, ch.devices)
		if ch.devices != nil && !exists {
			if err := c.AddSet(ports, nil); err != nil {
				return fmt.Errorf("nftables: map of table %s: %w", t.Name, err)
			}
			c.AddRule(&nftables.Rule{Table: t, Chain: &nftables.Chain{Table: t, Name: ch.name}, UserData: byDevice.comment(), Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
				&expr.Lookup{SourceRegister: 1, IsDestRegSet: true, SetName: ports.Name, SetID: ports.ID},
			}})
		}
		for some := range slices.Chunk(more, elementsAtOnce) {
			if err := c.SetAddElements(ports, elements(some)); err != nil {
				return fmt.Errorf("nftables: map of table %s: %w", t.Name, err)
			}
		}
		for some := range slices.Chunk(less, elementsAtOnce) {
			if err := c.SetDeleteElements(ports, elements(some)); err != nil {
				return fmt.Errorf("nftables: map of table %s: %w", t.Name, err)
			}
		}
		if exists && reflect.DeepEqual(was.rules, ch.rules) {
			continue
		}
		if exists {
			c.FlushChain(&nftables.Chain{Table: t, Name: ch.name})
		}
		for _, r := range ch.rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: &nftables.Chain{Table: t, Name: ch.name}, Exprs: r.exprs, UserData: r.comment()})
		}
	}
	var gone []*nftables.Chain
	for _, ch := range have {
		if _, stays := wanted[ch.name]; !stays {
			gone = append(gone, &nftables.Chain{Table: t, Name: ch.name})
		}
	}
	for _, ch := range gone { // they may lead to each other
		c.FlushChain(ch)
	}
	for _, ch := range gone {
		c.DelChain(ch)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: write table %s: %w", t.Name, err)
	}
	return nil
}

// elementsAtOnce keeps a message's list of elements under the 64 KiB of a netlink attribute.
const elementsAtOnce = 256

// byDevice is the rule that looks into the map of devices; it is a chain's first.
var byDevice = rule{text: "by device"}

func elements(devices []string) (list []nftables.SetElement) {
	for _, d := range devices {
		list = append(list, nftables.SetElement{Key: ifname(d), VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: d}})
	}
	return list
}

func byName(chains []chain) map[string]chain {
	m := make(map[string]chain, len(chains))
	for _, ch := range chains {
		m[ch.name] = ch
	}
	return m
}

// difference is what a has and b has not.
func difference(a, b []string) (out []string) {
	in := make(map[string]bool, len(b))
	for _, s := range b {
		in[s] = true
	}
	for _, s := range a {
		if !in[s] {
			out = append(out, s)
		}
	}
	return out
}

// intact reports whether the kernel has the chains and rules that want lists. Rules are known by their comments.
func (f *Firewall) intact(t *nftables.Table, want []chain) bool {
	c, err := nftables.New(nftables.WithNetNSFd(int(f.host.ns.Fd())), nftables.AsLasting())
	if err != nil {
		return false
	}
	defer c.CloseLasting()
	if found, err := c.ListTableOfFamily(t.Name, t.Family); err != nil || found.Flags&unix.NFT_TABLE_F_DORMANT != 0 {
		return false
	}
	got, err := f.comments(t)
	if err != nil {
		return false
	}
	for _, ch := range want {
		rules := ch.rules
		if ch.devices != nil {
			rules = append([]rule{byDevice}, rules...)
			set, err := c.GetSetByName(t, "ports")
			if err != nil {
				return false
			}
			found, err := c.GetSetElements(set)
			if err != nil || len(found) != len(ch.devices) {
				return false
			}
		}
		if len(got[ch.name]) != len(rules) {
			return false
		}
		for i, r := range rules {
			if !bytes.Equal(got[ch.name][i], r.comment()) {
				return false
			}
		}
	}
	return true
}

// comments reads the comments of all rules of a table by chain, in one answer.
func (f *Firewall) comments(t *nftables.Table) (map[string][][]byte, error) {
	conn, err := netlinkconn.Dial(unix.NETLINK_NETFILTER, &netlinkconn.Config{NetNS: int(f.host.ns.Fd())})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	name, err := netlinkconn.MarshalAttributes([]netlinkconn.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: append([]byte(t.Name), 0)}})
	if err != nil {
		return nil, err
	}
	replies, err := conn.Execute(netlinkconn.Message{
		Header: netlinkconn.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlinkconn.Request | netlinkconn.Dump},
		Data:   append([]byte{byte(t.Family), unix.NFNETLINK_V0, 0, 0}, name...),
	})
	if err != nil {
		return nil, err
	}
	out := map[string][][]byte{}
	for _, r := range replies {
		if len(r.Data) < 4 {
			continue
		}
		ad, err := netlinkconn.NewAttributeDecoder(r.Data[4:])
		if err != nil {
			return nil, err
		}
		var chain string
		var comment []byte
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_RULE_CHAIN:
				chain = ad.String()
			case unix.NFTA_RULE_USERDATA:
				comment = ad.Bytes()
			}
		}
		if err := ad.Err(); err != nil {
			return nil, err
		}
		out[chain] = append(out[chain], comment)
	}
	return out, nil
}

// Run keeps the rules until ctx ends, and leaves them then. It notices others' changes by the generation
// of the kernel's ruleset, which costs one small question twice a second.
func (f *Firewall) Run(ctx context.Context) error {
	watch := make(chan error, 1)
	go func() { watch <- f.host.Watch(ctx, func(State) { f.applyLogged() }) }()
	defer func() { <-watch }()
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	gens := &generations{host: f.host}
	defer gens.close()
	var last uint32
	var lastLayout [2][84]byte
	checked := time.Now()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.host.ports:
			if f.cfg.NoMasqLocal {
				f.applyLogged()
			}
		case now := <-tick.C:
			gen, layout := gens.now(), f.ipt.layout()
			due := f.legacy.Load() && now.Sub(checked) >= legacyEvery
			if gen == 0 || gen != last || layout != lastLayout || due {
				f.applyLogged()
				// As of before: what others did meanwhile, like what we wrote ourselves, is looked at next time.
				checked, last, lastLayout = now, gen, layout
			}
		}
	}
}

// applyLogged says what is wrong once, not with every try.
func (f *Firewall) applyLogged() {
	text := ""
	if err := f.Apply(); err != nil {
		text = err.Error()
	}
	f.mu.Lock()
	news := text != f.logged
	f.logged = text
	f.mu.Unlock()
	switch {
	case news && text != "":
		f.host.log.Warn("the firewall is not as it should be; trying again", "err", text)
	case news:
		f.host.log.Info("the firewall is as it should be again")
	}
}

// generations asks for the number of the ruleset's last change.
type generations struct {
	host *Host
	conn *netlinkconn.Conn // nil: to be opened
}

func (g *generations) close() {
	if g.conn != nil {
		g.conn.Close()
		g.conn = nil
	}
}

// now is the number, never zero, or zero if the kernel does not say.
func (g *generations) now() uint32 {
	n, err := g.ask()
	if err != nil {
		g.close()
		return 0
	}
	return n
}

func (g *generations) ask() (n uint32, err error) {
	if g.conn == nil {
		g.conn, err = netlinkconn.Dial(unix.NETLINK_NETFILTER, &netlinkconn.Config{NetNS: int(g.host.ns.Fd())})
		if err != nil {
			return 0, err
		}
	}
	replies, err := g.conn.Execute(netlinkconn.Message{
		Header: netlinkconn.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlinkconn.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil {
		return 0, err
	}
	for _, r := range replies {
		if len(r.Data) < 4 {
			continue
		}
		ad, err := netlinkconn.NewAttributeDecoder(r.Data[4:])
		if err != nil {
			return 0, err
		}
		ad.ByteOrder = binary.BigEndian
		for ad.Next() {
			if ad.Type() == unix.NFTA_GEN_ID {
				return ad.Uint32(), nil
			}
		}
	}
	return 0, errors.New("nftables: no generation in the answer")
}

// Remove takes all rules of ours away.
func (f *Firewall) Remove() error {
	f.apply.Lock()
	defer f.apply.Unlock()
	f.applied, f.bridged = nil, nil
	return errors.Join(
		f.ipt.remove(),
		f.delete(&nftables.Table{Family: nftables.TableFamilyINet, Name: f.host.cfg.Table}),
		f.delete(&nftables.Table{Family: nftables.TableFamilyBridge, Name: f.host.cfg.Table}),
	)
}
