package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"meshd/container"
	"meshd/container/docker"
	"meshd/control"
	"meshd/ipam"
	"meshd/mesh"
	"meshd/proxy"
	"meshd/router"
)

// The rooms in the words of those that use them.

// targets is the list of targets, which is kept for --resume.
type targets struct{ h *house }

func (t targets) Connect(list []string, replace bool) error {
	if err := t.h.gossip.Connect(list, replace); err != nil {
		return err
	}
	return saveTargets(t.h.state, t.h.gossip.Targets())
}

func (t targets) Forget(list []string) error {
	t.h.gossip.Forget(list)
	return saveTargets(t.h.state, t.h.gossip.Targets())
}

// attachments is the container room to the control API.
type attachments struct{ *container.Manager }

func (a attachments) Attach(ctx context.Context, r control.AttachRequest) (control.Changed, error) {
	c, err := a.Manager.Attach(ctx, container.Request{
		Target: r.Container, Addrs: r.Addresses, WithoutDNS: r.WithoutDNS, RewriteHosts: r.RewriteHosts,
		AddHosts: r.AddHosts, NoMulticastRoute: r.NoMulticastRoute,
	})
	return control.Changed(c), err
}

func (a attachments) Detach(ctx context.Context, r control.DetachRequest) (control.Changed, error) {
	c, err := a.Manager.Detach(ctx, r.Container, r.Addresses)
	return control.Changed(c), err
}

func (a attachments) Expose(ctx context.Context, r control.ExposeRequest) (control.Changed, error) {
	c, err := a.Manager.Expose(ctx, container.ExposeRequest{Addrs: r.Addresses, FQDN: r.FQDN, WithoutMasquerade: r.WithoutMasquerade})
	return control.Changed(c), err
}

func (a attachments) Hide(ctx context.Context, r control.HideRequest) (control.Changed, error) {
	c, err := a.Manager.Hide(ctx, r.Addresses)
	return control.Changed(c), err
}

func (a attachments) List(ctx context.Context, containers []string) ([]control.Attached, error) {
	list, err := a.Manager.List(ctx, containers)
	var out []control.Attached
	for _, x := range list {
		out = append(out, control.Attached(x))
	}
	return out, err
}

// containers is the container room to the Docker proxy.
type containers struct{ *container.Manager }

func (c containers) Attach(ctx context.Context, r proxy.Request) error {
	_, err := c.Manager.Attach(ctx, container.Request{
		Target: r.Container, Addrs: r.Addrs, WithoutDNS: r.WithoutDNS, RewriteHosts: r.RewriteHosts,
		AddHosts: r.AddHosts, NoMulticastRoute: r.NoMulticastRoute,
	})
	if errors.Is(err, container.ErrNotRunning) || errors.Is(err, docker.ErrNotFound) {
		err = fmt.Errorf("%w: %w", proxy.ErrEnded, err)
	} else if errors.Is(err, docker.ErrUnavailable) {
		err = fmt.Errorf("%w: %w", proxy.ErrAway, err)
	}
	return err
}

func (c containers) Interface(id string) (mesh.MAC, []netip.Prefix, bool) {
	list, err := c.Manager.List(context.Background(), []string{id})
	if err != nil || len(list) != 1 {
		return mesh.MAC{}, nil, false
	}
	return list[0].MAC, list[0].Addresses, true
}

// handmade is the names made by hand to the control API.
type handmade struct{ h *house }

func (n handmade) Add(ctx context.Context, r control.NameRequest) error {
	info, addrs, err := n.resolve(ctx, r)
	if err != nil {
		return err
	}
	name := r.FQDN
	if name == "" {
		name = info.FQDN
	}
	if name == "" {
		return fmt.Errorf("container %s has no name in the domain %s: give one with -h", r.Container, n.h.cfg.DNS.Domain)
	}
	if len(addrs) == 0 {
		return fmt.Errorf("container %s has no address on the mesh", r.Container)
	}
	return n.h.records.AddName(info.Owner, name, addrs)
}

func (n handmade) Remove(ctx context.Context, r control.NameRequest) error {
	info, addrs, err := n.resolve(ctx, r)
	if err != nil {
		return err
	}
	_, err = n.h.records.RemoveName(info.Owner, r.FQDN, addrs)
	return err
}

// resolve finds whom a request is about, and which addresses.
func (n handmade) resolve(ctx context.Context, r control.NameRequest) (container.Info, []netip.Addr, error) {
	if r.Container == mesh.OwnerExtern {
		return container.Info{Owner: r.Container}, r.Addrs, nil
	}
	info, err := n.h.containers.Lookup(ctx, r.Container)
	if err != nil {
		return info, nil, err
	}
	addrs := r.Addrs
	if len(addrs) == 0 {
		for _, p := range info.Addresses {
			addrs = append(addrs, p.Addr())
		}
	}
	return info, addrs, nil
}

func (n handmade) Domain() string { return n.h.cfg.DNS.Domain }

func (n handmade) Server() netip.AddrPort { return n.h.names.Addr() }

// addressRing is ipam's ring to the control API.
type addressRing struct{ h *house }

func (a addressRing) Prime(ctx context.Context) error { return a.h.addresses.Prime(ctx) }

// RemovePeer takes a name or a nickname. Nobody of that name, or this peer itself, is 0 addresses.
func (a addressRing) RemovePeer(ctx context.Context, peer string) (n int, err error) {
	for _, name := range meant(peer, a.h.self, a.h.gossip.Status().Peers) {
		taken, err := a.h.addresses.RemovePeer(ctx, name)
		if n += taken; err != nil {
			return n, err
		}
	}
	return n, nil
}

// meant is whom somebody means who says that a peer is gone. A host that was made anew has the nickname of the peer that
// it was before: then that one is meant.
func meant(peer string, self mesh.PeerName, all []router.PeerView) (gone []mesh.PeerName) {
	if name, err := mesh.ParsePeerName(peer); err == nil {
		return []mesh.PeerName{name}
	}
	var here []mesh.PeerName
	for _, p := range all {
		switch {
		case p.NickName != peer || p.Name == self:
		case p.State == router.Alive:
			here = append(here, p.Name)
		default:
			gone = append(gone, p.Name)
		}
	}
	if len(gone) > 0 {
		return gone
	}
	return here // who will be told that it is alive
}

// leavePause is time for the peers to hear that our endpoints are gone, before the daemon is stopped.
const leavePause = 300 * time.Millisecond

// Leave gives the space to an heir and takes our containers' names back. The last peer has no heir, and
// then nobody misses the space.
func (a addressRing) Leave(ctx context.Context) error {
	n, err := a.h.addresses.LeaveAll(ctx)
	switch {
	case errors.Is(err, ipam.ErrNoHeir):
		a.h.log.Info("nobody is there to take the addresses over")
	case err != nil:
		a.h.log.Info("gave the address space away", "addresses", n, "err", err)
		return err
	default:
		a.h.log.Info("gave the address space away", "addresses", n)
	}
	for _, ep := range a.h.records.Endpoints() {
		if ep.Peer == a.h.self {
			a.h.records.Withdraw(ep.Owner, ep.MAC)
		}
	}
	select {
	case <-time.After(leavePause):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a addressRing) Repair(ctx context.Context) (string, error) {
	done, err := a.h.addresses.Repair(ctx)
	if err != nil {
		return "", err
	}
	return repairText(done, a.h.containers.Called), nil
}

// repairText says what a repair came to; called is what commands call an owner by.
func repairText(done ipam.Repaired, called func(owner string) string) string {
	var b strings.Builder
	switch {
	case done.Merged:
		b.WriteString("the two clusters are one; \"meshctl status\" of each host names the addresses that are there twice\n")
	case done.Taken > 0:
		fmt.Fprintf(&b, "this peer took %d addresses that nobody in reach knew the owner of\n", done.Taken)
	case done.Filled:
		b.WriteString("the addresses that nobody owned are another peer's meanwhile\n")
	default:
		b.WriteString("nothing to repair: all addresses of the range have an owner, and no peer in reach belongs to another cluster\n")
	}
	for _, c := range done.Collisions {
		b.WriteString(collisionText(c, called) + "\n")
	}
	return b.String()
}

// collisionText says who has the same address, and which command gives the container here another one in its place.
func collisionText(c ipam.Collision, called func(owner string) string) string {
	who := called(c.Owner)
	command := fmt.Sprintf("meshctl attach net:%v %s", c.Addr.Masked(), who)
	if c.Owner == mesh.OwnerExpose {
		command = fmt.Sprintf("meshctl expose net:%v", c.Addr.Masked())
	}
	return fmt.Sprintf("%v of %s is also held by %s; another one in its place: %s", c.Addr, who, c.With, command)
}
