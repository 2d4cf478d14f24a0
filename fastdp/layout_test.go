package fastdp

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
)

var update = flag.Bool("update", false, "rewrite golden files")

// TestLayout compares the structures of C and Go, and both with what this LayoutVersion was when it was
// made: a difference means that the version must be raised.
func TestLayout(t *testing.T) {
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for name, v := range map[string]any{"config": bpfConfig{}, "peer": bpfPeer{}, "underlay_key": bpfUnderlayKey{}, "endpoint": bpfEndpoint{},
		"port": bpfPort{}, "network": bpfNetwork{}, "counter": bpfCounter{}, "offence_key": bpfOffenceKey{}} {
		var s *btf.Struct
		if err := spec.Types.TypeByName(name, &s); err != nil {
			t.Errorf("struct %s: %v", name, err)
			continue
		}
		goType := reflect.TypeOf(v)
		if uint32(goType.Size()) != s.Size {
			t.Errorf("struct %s: %d bytes in C, %d in Go", name, s.Size, goType.Size())
		}
		for i, m := range s.Members {
			f := goType.Field(i + 1) // after the marker of the host's layout
			size, err := btf.Sizeof(m.Type)
			if err != nil {
				t.Fatal(err)
			}
			if uint32(f.Offset) != m.Offset.Bytes() || int(f.Type.Size()) != size || !strings.EqualFold(f.Name, strings.ReplaceAll(m.Name, "_", "")) {
				t.Errorf("struct %s: %s is at %d, %d bytes in C; %s at %d, %d bytes in Go", name, m.Name, m.Offset.Bytes(), size, f.Name, f.Offset, f.Type.Size())
			}
		}
	}
	for _, name := range []string{"config", "peer", "underlay_key", "endpoint", "port", "network"} {
		var s *btf.Struct
		if err := spec.Types.TypeByName(name, &s); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&text, "struct %s %d\n", name, s.Size)
		for _, m := range s.Members {
			size, _ := btf.Sizeof(m.Type)
			fmt.Fprintf(&text, "\t%3d %3d %s\n", m.Offset.Bytes(), size, m.Name)
		}
	}
	for _, m := range []string{bpfMapConfig, bpfMapPeers, bpfMapUnderlays, bpfMapEndpoints, bpfMapPorts, bpfMapNetworks} {
		ms := spec.Maps[m]
		fmt.Fprintf(&text, "map %s %v key %d value %d entries %d\n", m, ms.Type, ms.KeySize, ms.ValueSize, ms.MaxEntries)
	}
	golden := filepath.Join("testdata", fmt.Sprintf("layout-v%d.txt", LayoutVersion))
	if *update {
		if err := os.WriteFile(golden, []byte(text.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if text.String() != string(want) {
		t.Errorf("layout of version %d has changed: raise LayoutVersion, then -update; got\n%s", LayoutVersion, text.String())
	}
}

// TestConstants compares the flags and limits of tables.go with bpf/maps.h.
func TestConstants(t *testing.T) {
	text, err := os.ReadFile("bpf/maps.h")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int{
		"MAX_PEERS": maxPeers, "MAX_PORTS": maxPorts, "MAX_ENDPOINTS": maxForeign + maxPorts, "MAX_ADDR4": maxAddr4, "MAX_ADDR6": maxAddr6, "NET_WORDS": maxNetworks / 64, "CONFIG_RELAY": configRelay,
		"PEER_KNOWN": peerKnown, "PEER_UP": peerUp, "PEER_TO_V6": peerToV6, "PEER_FROM_V6": peerFromV6, "PEER_RELAYED": peerRelayed,
		"ENDPOINT_LOCAL": endpointLocal, "ENDPOINT_VETH": endpointVeth, "ENDPOINT_HOST": endpointHost, "ENDPOINT_ANNOUNCED": endpointAnnounced,
		"PORT_EXEMPT": portExempt, "PORT_ANNOUNCED": portAnnounced,
	} {
		m := regexp.MustCompile(`\b` + name + `(?: =)? (\d+)\b`).FindSubmatch(text)
		if m == nil {
			t.Errorf("%s is not in bpf/maps.h", name)
			continue
		}
		if got, _ := strconv.Atoi(string(m[1])); got != want {
			t.Errorf("%s: %d in C, %d in Go", name, got, want)
		}
	}
}
