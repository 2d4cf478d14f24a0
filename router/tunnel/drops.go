package tunnel

import "sync/atomic"

// drop is why a datagram or frame went no further; each reason has a counter.
type drop uint8

const (
	dropNone        drop = iota
	dropType             // datagram of unknown type or version, or too short for its type
	dropMAC              // handshake whose MAC is not of our password
	dropHandshake        // handshake that does not authenticate or is out of place
	dropBusy             // handshake beyond what is served under load
	dropSession          // datagram for a session we do not know
	dropReplay           // counter seen before, or too old
	dropForged           // seal does not open, or clear tag is wrong
	dropClear            // in clear where it must be sealed
	dropBody             // sealed body that does not parse
	dropQueue            // control queue full
	dropRelaySource      // relay header from an address that is no live link
	dropRelayRoute       // relay without a way to the destination
	dropRelayHops        // relay with a count that nobody sends
	dropRelayStray       // relay by a way that has more links than its sender allows
	dropRelaySize        // relayed datagram larger than the next link carries
	dropNoRoute          // frame or message for a peer that cannot be reached
	dropNoSession        // frame or message while the session is not up yet and its queue is full
	dropTooBig           // frame larger than the path carries, not IP
	dropTooBigTold       // the same, and its sender was told by ICMP
	dropMalformed        // frame or virtio header that makes no sense
	dropCounter          // counter used up before a new key was there
	dropFull             // socket buffer full
	dropSend             // socket refused the datagram
	dropSize             // datagram larger than the underlay interface carries
	dropPort             // TAP refused the frame
	dropSwitch           // a frame from a peer that would have to leave by the tunnel again
	dropStream           // TCP connection refused
	dropHint             // "unknown session" hint that was not believed
	dropCount
)

var dropNames = [dropCount]string{
	"none", "type", "mac", "handshake", "busy", "session", "replay", "forged", "clear", "body", "queue",
	"relay_source", "relay_route", "relay_hops", "relay_stray", "relay_size", "no_route", "no_session", "too_big", "too_big_told",
	"malformed", "counter", "send_full", "send_error", "send_size", "port", "switch", "stream", "hint",
}

// drops counts. Each counter has a cache line to itself, for two cores may count different reasons at once.
type drops [dropCount]struct {
	n atomic.Uint64
	_ [56]byte
}

func (d *drops) add(why drop) { d[why].n.Add(1) }

// snapshot names the counters that are not zero.
func (d *drops) snapshot() map[string]uint64 {
	out := make(map[string]uint64)
	for i := 1; i < int(dropCount); i++ {
		if n := d[i].n.Load(); n > 0 {
			out[dropNames[i]] = n
		}
	}
	return out
}
