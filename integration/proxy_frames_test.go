package integration

import (
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"
)

// roundTrips pings for a while and gives the times of all answers, sorted, and how many pings had none.
func (w *world) roundTrips(from, to *member, lasting time.Duration) (rtts []time.Duration, lost int) {
	w.t.Helper()
	const every = 2 * time.Millisecond
	count := int(lasting / every)
	r, err := from.Run(w.ctx, "ping", "-n", "-i", fmt.Sprint(every.Seconds()), "-c", strconv.Itoa(count), "-W", "1", to.addr.String())
	w.try(err)
	for _, m := range regexp.MustCompile(`time=([0-9.]+) ms`).FindAllStringSubmatch(r.Stdout, -1) {
		ms, err := strconv.ParseFloat(m[1], 64)
		w.try(err)
		rtts = append(rtts, time.Duration(ms*1e6))
	}
	if len(rtts) == 0 {
		w.t.Fatal(r)
	}
	slices.Sort(rtts)
	return rtts, count - len(rtts)
}

// TestFramesDuringCopy has frames cross the userspace path of a host on which files go in and out of a container, by
// the proxy and directly.
func TestFramesDuringCopy(t *testing.T) {
	if !long() {
		t.Skip("what it measures says little in less time; MESHD_LONG=1 runs it")
	}
	w := newWorld(t, 2, 3*time.Minute)
	h1, h2 := w.Host(1), w.Host(2)
	w.docker(h1)
	w.mesh("--no-fastdp")
	w.proxied(h1, "box")
	c1, c2 := w.netns(h1, "c1", "10.2.1.1/24"), w.netns(h2, "c2", "10.2.1.2/24")
	_, err := c1.WaitPing(w.ctx, c2.addr, 5*time.Second)
	w.try(err)
	_, err = h1.Out(w.ctx, "sh", "-c", "truncate -s 256M /var/tmp/big; docker cp /var/tmp/big box:/big")
	w.try(err)
	at := func(sorted []time.Duration, percent int) time.Duration { return sorted[len(sorted)*percent/100] }
	all := map[string][]time.Duration{}
	measure := func(what, endpoint, script string) {
		if script != "" {
			p, err := h1.Start(w.ctx, func(c *exec.Cmd) { c.Env = append(c.Env, "DOCKER_HOST="+endpoint) }, "sh", "-c", "while "+script+"; do echo >>/var/tmp/copies; done")
			w.try(err)
			defer func() {
				w.try(p.Stop(5 * time.Second))
				lines, err := h1.ReadFile("/var/tmp/copies")
				w.try(err)
				_, err = h1.Out(w.ctx, "rm", "/var/tmp/copies")
				w.try(err)
				t.Logf("%s: %d copies", what, len(lines))
			}()
			w.rest(500 * time.Millisecond)
		}
		rtts, lost := w.roundTrips(c1, c2, 4*time.Second)
		all[what] = append(all[what], rtts...)
		t.Logf("%s: %d pings, %d lost, %v (median) %v (99th percentile) %v (longest)", what, len(rtts), lost, at(rtts, 50), at(rtts, 99), rtts[len(rtts)-1])
	}
	for range 3 {
		measure("nothing", "", "")
		for _, c := range []struct{ what, script string }{
			{"in", "docker cp -q /var/tmp/big box:/big"}, {"out", "docker cp -q box:/big - >/dev/null"},
		} {
			measure(c.what+" directly", dockerSocket, c.script)
			measure(c.what+" by the proxy", proxySocket, c.script)
		}
	}
	for _, what := range []string{"in", "out"} {
		direct, proxied := all[what+" directly"], all[what+" by the proxy"]
		slices.Sort(direct)
		slices.Sort(proxied)
		t.Logf("%s: median %v directly, %v by the proxy; 99th percentile %v, %v", what, at(direct, 50), at(proxied, 50), at(direct, 99), at(proxied, 99))
		// Of three programs that share two processors with what pings, the 99th percentile says little.
		if at(proxied, 50) > 3*at(direct, 50)+time.Millisecond || at(proxied, 99) > 2*at(direct, 99)+100*time.Millisecond {
			t.Errorf("a file on its way %s by the proxy delays frames", what)
		}
	}
	_, err = h1.Out(w.ctx, "rm", "/var/tmp/big")
	w.try(err)
	w.dockerAt(h1, dockerSocket, "", "rm", "-f", "box")
}
