package control

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func TestStatusTexts(t *testing.T) {
	r := sample(t)
	r.complete()
	for _, sub := range append([]string{""}, StatusWords...) {
		text, found, ok := r.statusText(sub)
		if !found || !ok {
			t.Fatalf("status %q: found %v, ok %v", sub, found, ok)
		}
		file := "status.golden"
		if sub != "" {
			file = "status-" + sub + ".golden"
		}
		golden(t, file, text)
	}
	b, err := json.MarshalIndent(r, "", "    ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "report.golden", string(b)+"\n")
}

// Scripts find values in the summary by a label with a space before it: each must match once.
func TestSummaryLabelsAreUnique(t *testing.T) {
	r := sample(t)
	r.Plugin = &Plugin{DriverName: "mesh"}
	r.complete()
	text := r.summaryText()
	for label, want := range map[string]string{
		"Name":          "4a:0f:f6:ec:1c:93(host1)",
		"Peers":         "3 (with 2 established, 1 pending connections)",
		"DefaultSubnet": "10.32.0.0/12",
		"Domain":        "mesh.internal.",
	} {
		got := regexp.MustCompile(`(?m) `+label+`: (.*)$`).FindAllStringSubmatch(text, -1)
		if len(got) != 1 || got[0][1] != want {
			t.Errorf("%s: got %q, want %q once", label, got, want)
		}
	}
	if line, _, _ := strings.Cut(text, "\n"); !strings.Contains(line, "version check update disabled") {
		t.Errorf("first line: got %q", line)
	}
}

func TestStatusOfAnEmptyMesh(t *testing.T) {
	r := Report{Version: "1", Router: &Router{}, IPAM: &IPAM{Status: IPAMConsensus, Paxos: &Paxos{Quorum: 2, KnownNodes: 1}}}
	r.complete()
	for _, sub := range []string{"targets", "connections", "peers", "ipam"} {
		if text, found, ok := r.statusText(sub); text != "" || !found || !ok {
			t.Errorf("status %s: got %q, %v, %v", sub, text, found, ok)
		}
	}
	text := r.summaryText()
	for _, want := range []string{"Connections: 0\n", "Peers: 0\n", "Status: awaiting consensus (quorum: 2, known: 1)\n", "TrustedSubnets: none\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("got\n%s\nwant %q in it", text, want)
		}
	}
	if _, found, _ := r.statusText("dns"); found {
		t.Error("dns is off and was found")
	}
	if _, _, ok := r.statusText("nonsense"); ok {
		t.Error("nonsense is a status")
	}
}

func TestFormat(t *testing.T) {
	r := sample(t)
	r.complete()
	for _, c := range []struct{ format, want string }{
		{"{{.Version}}", "1.2.3"},
		{"{{.Router.Name}} {{.Router.NickName}}", "4a:0f:f6:ec:1c:93 host1"},
		{"{{range .Router.Targets}}{{.}};{{end}}", "192.168.48.14;host5:6783;"},
		{"{{json .Router.Targets}}", `["192.168.48.14","host5:6783"]`},
		{"{{(index .Router.Connections 0).Attrs.mtu}}", "1376"},
		{"{{range .DNS.Entries}}{{if eq .Tombstone 0}}{{.Hostname}} {{end}}{{end}}", "one.mesh.internal. a.two.mesh.internal. "},
		{"{{.IPAM.DefaultSubnet}} {{.VersionCheck.Enabled}}", "10.32.0.0/12 false"},
	} {
		if got, err := r.Format(c.format); got != c.want || err != nil {
			t.Errorf("%s: got %q, %v, want %q", c.format, got, err, c.want)
		}
	}
	for _, format := range []string{"{{", "{{.Nonsense}}", "{{nonsense}}", "{{.Plugin.DriverName}}",
		`{{range 100000000}}0123456789{{end}}`} {
		if got, err := r.Format(format); err == nil {
			t.Errorf("%s: got %d bytes, want an error", format, len(got))
		}
	}
}
