package control

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"meshd/mesh"
)

// collector makes the metrics from a report at each scrape, so that they never disagree with status.
type collector struct{ report func() *Report }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("meshd_"+name, help, labels, nil)
}

var (
	descReady        = desc("ready", "1 once the daemon serves.")
	descProblems     = desc("problems", "Number of problems that status shows.")
	descConnections  = desc("connections", "Connections to other peers, by state and path.", "encryption", "state", "type")
	descTerminations = desc("connection_terminations_total", "Connections that have ended.")
	descPeers        = desc("peers", "Peers of the mesh, this one included.")
	descFlows        = desc("flows", "Entries in the tables of the kernel path.")
	descMACs         = desc("macs", "Known MAC addresses.")
	descDrops        = desc("drops_total", "Frames and datagrams dropped.", "reason")
	descOffences     = desc("offences_total", "Frames of a container that the port guard dropped.", "container", "reason")
	descBytes        = desc("peer_bytes_total", "Bytes of overlay frames exchanged with a peer.", "peer", "direction")
	descFrames       = desc("peer_frames_total", "Overlay frames exchanged with a peer.", "peer", "direction")
	descIPs          = desc("ips", "Addresses of the range in use here.", "state")
	descMaxIPs       = desc("max_ips", "Addresses of the whole range.")
	descUnreachable  = desc("ipam_unreachable_count", "Peers that own addresses and cannot be reached.")
	descUnreachPct   = desc("ipam_unreachable_percentage", "Part of the range that such peers own, in percent.")
	descPendAllocs   = desc("ipam_pending_allocates", "Allocations that wait for other peers.")
	descPendClaims   = desc("ipam_pending_claims", "Claims that wait for other peers.")
	descDNSEntries   = desc("dns_entries", "Names of this peer's own endpoints.")
)

var allDescs = []*prometheus.Desc{
	descReady, descProblems, descConnections, descTerminations, descPeers, descFlows, descMACs, descDrops, descOffences, descBytes,
	descFrames, descIPs, descMaxIPs, descUnreachable, descUnreachPct, descPendAllocs, descPendClaims, descDNSEntries,
}

func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range allDescs {
		out <- d
	}
}

func (c *collector) Collect(out chan<- prometheus.Metric) {
	r := c.report()
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	ready := 0
	if r.Ready {
		ready = 1
	}
	gauge(descReady, ready)
	gauge(descProblems, len(r.Problems))
	if r.Router != nil {
		collectRouter(r.Router, gauge, counter)
	}
	if r.IPAM != nil {
		collectIPAM(r.IPAM, gauge)
	}
	if r.DNS != nil {
		own := 0
		for _, e := range r.DNS.live() {
			if r.Router == nil || e.Origin == r.Router.Name {
				own++
			}
		}
		gauge(descDNSEntries, own)
	}
}

func collectRouter(r *Router, gauge func(*prometheus.Desc, int, ...string), counter func(*prometheus.Desc, uint64, ...string)) {
	type key struct{ encryption, state, overlay string }
	count := map[key]int{}
	for _, c := range r.Connections {
		k := key{"", c.State, c.Overlay}
		if c.Encrypted {
			k.encryption = "yes"
		}
		count[k]++
	}
	for k, n := range count {
		gauge(descConnections, n, k.encryption, k.state, k.overlay)
	}
	counter(descTerminations, r.TerminationCount)
	gauge(descPeers, len(r.Peers))
	gauge(descFlows, r.Flows)
	gauge(descMACs, len(r.MACs))
	for reason, n := range r.Drops {
		counter(descDrops, n, reason)
	}
	offences := map[[2]string]uint64{} // a label that comes twice would spoil the scrape
	for _, o := range r.Offences {
		offences[[2]string{o.ContainerID, o.Reason}] += o.Frames
	}
	for k, n := range offences {
		counter(descOffences, n, k[0], k[1])
	}
	traffic := map[mesh.PeerName]PeerTraffic{} // likewise
	for _, t := range r.Traffic {
		sum := traffic[t.Name]
		sum.BytesIn += t.BytesIn
		sum.BytesOut += t.BytesOut
		sum.FramesIn += t.FramesIn
		sum.FramesOut += t.FramesOut
		traffic[t.Name] = sum
	}
	for peer, t := range traffic {
		name := peer.String()
		counter(descBytes, t.BytesIn, name, "in")
		counter(descBytes, t.BytesOut, name, "out")
		counter(descFrames, t.FramesIn, name, "in")
		counter(descFrames, t.FramesOut, name, "out")
	}
}

func collectIPAM(i *IPAM, gauge func(*prometheus.Desc, int, ...string)) {
	gauge(descIPs, i.ActiveIPs, "local-used")
	gauge(descMaxIPs, i.RangeNumIPs)
	lost := map[mesh.PeerName]bool{}
	lostSize, total := 0, 0
	for _, e := range i.Entries {
		total += e.Size
		if !e.IsKnownPeer {
			lost[e.Peer] = true
			lostSize += e.Size
		}
	}
	gauge(descUnreachable, len(lost))
	if total > 0 {
		gauge(descUnreachPct, lostSize*100/total)
	} else {
		gauge(descUnreachPct, 0)
	}
	gauge(descPendAllocs, len(i.PendingAllocates))
	gauge(descPendClaims, len(i.PendingClaims))
}

// metricsHandler serves GET /metrics.
func (s *Server) metricsHandler() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(&collector{s.report}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}
