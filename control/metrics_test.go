package control

import (
	"regexp"
	"strings"
	"testing"
)

func TestMetrics(t *testing.T) {
	f := &fake{report: sample(t)}
	s := start(t, Config{}, f.backends())
	code, text := get(t, s.Addr(0), "GET", "/metrics", nil, "")
	if code != 200 {
		t.Fatalf("got %d %s", code, text)
	}
	own := regexp.MustCompile(`(?m)^meshd_.*$`).FindAllString(text, -1)
	golden(t, "metrics.golden", strings.Join(own, "\n")+"\n")
	for _, other := range []string{"go_goroutines ", "process_open_fds "} {
		if !strings.Contains(text, other) {
			t.Errorf("%s is missing", other)
		}
	}
}

// A scrape of a daemon with nothing to tell, and with entries that come twice, works.
func TestMetricsOfAnEmptyReport(t *testing.T) {
	r := Report{Router: &Router{Connections: []Connection{{State: ConnConnecting}, {State: ConnConnecting}},
		Traffic: []PeerTraffic{{BytesIn: 1}, {BytesIn: 2}}}, IPAM: &IPAM{}, DNS: &DNS{}}
	s := start(t, Config{}, Backends{Reporter: &fake{report: r}})
	code, text := get(t, s.Addr(0), "GET", "/metrics", nil, "")
	for _, want := range []string{
		`meshd_connections{encryption="",state="connecting",type=""} 2`,
		`meshd_peer_bytes_total{direction="in",peer="00:00:00:00:00:00"} 3`,
	} {
		if code != 200 || !strings.Contains(text, want) {
			t.Errorf("got %d %s, want %s", code, text, want)
		}
	}
}
