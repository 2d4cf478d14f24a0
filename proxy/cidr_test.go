package proxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"meshd/mesh"
)

// cidr is a value of MESH_CIDR or WEAVE_CIDR and what has to come of it.
type cidr struct {
	value string
	want  []string // canonical words, or only "none": off the mesh
	err   string   // what a refusal has in it; then want is nil
}

// What an error says of each fault.
const (
	noLength  = "length of the subnet is missing"
	noAddress = "not an address with the length"
	isNetwork = "is the network address of"
	isLast    = "is the broadcast address of"
	isAnycast = "is the anycast address of all routers of"
	tooSmall  = "the smallest subnet has four addresses"
	wholeWord = "the whole world"
	hostBits  = "has bits set beyond its length; the subnet is net:"
	outside   = "lies outside the range"
	alone     = `"none" stands alone`
	tooLong   = "too long"
)

func dotted(a uint32) string { return fmt.Sprintf("%d.%d.%d.%d", a>>24, a>>16&255, a>>8&255, a&255) }

// everyLength puts each kind of address of a subnet to each form, for every length of an IPv4 subnet.
func everyLength() (all []cidr) {
	for length := range uint32(31) {
		if length == 0 {
			continue
		}
		size := uint32(1) << (32 - length)
		network := 0x0a2bc9d4 / size * size // of 10.43.201.212, in 10.32.0.0/12
		for _, form := range []string{"", "ip:"} {
			for _, c := range []struct {
				addr uint32
				err  string
			}{{network, isNetwork}, {network + 1, ""}, {network + size - 2, ""}, {network + size - 1, isLast}} {
				err := c.err
				switch { // what the address is by itself comes before its place in the subnet
				case c.addr == 0:
					err = "is the unspecified address"
				case c.addr>>24 == 127:
					err = "is a loopback address"
				}
				word := fmt.Sprintf("%s/%d", dotted(c.addr), length)
				all = append(all, cidr{value: form + word, err: err})
				if err == "" {
					all[len(all)-1].want = []string{"ip:" + word}
				}
			}
		}
		subnet := fmt.Sprintf("net:%s/%d", dotted(network), length)
		all = append(all, cidr{value: subnet, want: []string{subnet}},
			cidr{value: fmt.Sprintf("net:%s/%d", dotted(network+1), length), err: hostBits + dotted(network)})
		if length < 12 {
			all[len(all)-2] = cidr{value: subnet, err: outside}
		}
	}
	return all
}

// everyFault has every form with everything that can be wrong with an address and its length.
func everyFault() (all []cidr) {
	for _, form := range []string{"", "ip:", "net:"} {
		addr := "10.43.1.1"
		good := "ip:" + addr + "/24"
		if form == "net:" {
			addr = "10.43.1.0"
			good = "net:" + addr + "/24"
		}
		bad := func(err string, values ...string) {
			for _, v := range values {
				all = append(all, cidr{value: form + strings.ReplaceAll(v, "A", addr), err: err})
			}
		}
		for _, around := range []string{"%s", " %s", "%s ", "\t%s\n", "\u00a0%s\u2003", "\r\n%s"} {
			all = append(all, cidr{value: fmt.Sprintf(around, form+addr+"/24"), want: []string{good}})
		}
		bad(noLength, "A", "A ", "A /24", "x", "default.", "A\\24", "A\u221524", "A-24", "A:24", "A,24", "0x0a2b0101")
		bad(noAddress, "/", "A/", "/24", "A//24", "A/ 24", "A/+24", "A/-1", "A/-0", "A/024", "A/00", "A/33", "A/99", "A/128", "A/256",
			"A/18446744073709551640", "A/0x18", "A/2\u0664", "A/２４", "A/24x", "A/x24", "A/24.0", "A/24/24", "A/255.255.255.0", "A/24%eth0", "A%eth0/24",
			"A/24,A/24", "A/24;A/24", "A/24,", "A/24;", "A/24.", `"A/24"`, "'A/24'", "[A]/24", "A/24\x00", "A\x00/24", "\ufeffA/24", "\u200bA/24", "A/24\u200b",
			"10.43.1/24", "10.43/16", "10/8", "10.43.1.1.1/24", "10.43..1/24", ".10.43.1.1/24", "10.43.1.1./24", "10.43.1.256/24", "10.43.1.-1/24",
			"010.43.1.1/24", "10.043.1.1/24", "10.43.1.01/24", "10.43.1.001/24", "0xa.43.1.1/24", "167772161/24", "１０.43.1.1/24", "10．43．1．1/24", "1e1.43.1.1/24",
			"\u0661\u0660.43.1.1/24", "host/24", "IP:A/24", "Ip:A/24", "NET:A/24", "http://A/24", "*/24", "10.43.1.*/24",
			"fd00:::1/64", "fd00::1::2/64", "12345::1/64", "fd00::1%eth0/64", "[fd00::1]/64", "fd00::1/129", "fd00::1/-1", "fd00::1/064", "fd00:1/64",
			"fd00::g/64", ":/64", ":::/64", "1:2:3:4:5:6:7:8:9/64", "1:2:3:4:5:6:7/64", "fd00::10.43.1/64", "fd00::10.43.1.256/64")
		bad(noLength, "fd00::1", "::", "::1")
		if form != "" {
			bad(noLength, "", " A/24")
			bad(noAddress, "ip:A/24", "net:A/24")
		}
		bad(wholeWord, "A/0", "0.0.0.0/0", "::/0", "fd00::1/0")
		bad(tooSmall, "A/31", "A/32", "fd00::1/127", "fd00::1/128", "fd00::/127")
		bad("loopback", "127.0.0.1/8", "127.43.1.0/24", "::1/64")
		bad("multicast", "224.0.0.1/24", "239.255.255.250/16", "ff02::1/64")
		bad("link-local", "fe80::1/64")
		bad("IPv4 address is not written as IPv6", "::ffff:10.43.1.1/120", "::ffff:a2b:101/96")
		bad(tooLong, strings.Repeat("1", 100), "A/24"+strings.Repeat("0", 80), strings.Repeat("A.", 40)+"/24", strings.Repeat("x", 70000))
		// Blanks tear a word apart, and then the first part that is none is named.
		bad(noLength, "A A/24", "A\t/24", "A\u00a0/24")
	}
	return all
}

// byHand is the rest of the grammar.
func byHand() []cidr {
	ok := func(value string, want ...string) cidr { return cidr{value: value, want: want} }
	no := func(value, err string) cidr { return cidr{value: value, err: err} }
	many := func(word string, n int) string { return strings.TrimSpace(strings.Repeat(word+" ", n)) }
	return []cidr{
		ok(""), ok(" "), ok(" \t\n "), ok("\u00a0"),
		ok("net:default", "net:default"), ok("  net:default ", "net:default"),
		no("default", noLength), no("ip:default", noLength), no("net:Default", noLength), no("NET:DEFAULT", noLength), no("net: default", noLength),
		no("net:default/24", noAddress), no("net:default,", noLength), no("net:default.", noLength),
		ok("none", "none"), ok(" none\n", "none"),
		no("None", noLength), no("NONE", noLength), no("none,", noLength), no("none.", noLength), no(`"none"`, noLength), no("none/24", noAddress),
		no("ip:none", noLength), no("net:none", noLength), no("no", noLength), no("off", noLength), no("false", noLength), no("0", noLength), no("null", noLength),
		no("none none", alone), no("none net:default", alone), no("net:default none", alone), no("10.43.1.1/24 none", alone), no("none 10.43.1.1/24", alone),
		no("none 10.43.1.0/24", alone), no("10.43.1.0/24 none", isNetwork), no("net:10.43.1.0/24 none net:default", alone),
		// Several.
		ok("10.43.1.1/24 net:default", "ip:10.43.1.1/24", "net:default"),
		ok("10.43.1.1/24\tnet:10.44.0.0/16\nfd00::1/64", "ip:10.43.1.1/24", "net:10.44.0.0/16", "ip:fd00::1/64"),
		ok("10.43.1.1/24 10.43.1.2/24", "ip:10.43.1.1/24", "ip:10.43.1.2/24"),
		ok("10.43.1.1/24 ip:10.43.1.1/24", "ip:10.43.1.1/24", "ip:10.43.1.1/24"),
		ok("net:default net:default", "net:default", "net:default"),
		ok("net:10.43.1.0/24 net:10.43.1.0/24", "net:10.43.1.0/24", "net:10.43.1.0/24"),
		ok("net:10.43.1.0/24 net:10.43.0.0/16", "net:10.43.1.0/24", "net:10.43.0.0/16"),
		no("10.43.1.1/24 10.43.1.1/16", "the lengths 24 and 16"), no("10.43.1.1/24 net:default ip:10.43.1.1/25", "the lengths 24 and 25"),
		no("fd00::1/64 fd00:0::1/48", "the lengths 64 and 48"),
		no("10.43.1.1/24 nonsense", `"nonsense"`), no("nonsense 10.43.1.1/24", `"nonsense"`), no("10.43.1.1/24 10.43.1.0/24", `"10.43.1.0/24"`),
		no("10.43.1.1/24, 10.43.1.2/24", noAddress), no("10.43.1.1/24 ,", noLength), no("10.43.1.1/24 # mine", noLength),
		ok(many("net:default", 64), slices.Repeat([]string{"net:default"}, 64)...), no(many("net:default", 65), "at most 64"), no(many("x", 10000), "at most 64"),
		// The range is 10.32.0.0/12. A single address may lie anywhere.
		ok("10.32.0.1/12", "ip:10.32.0.1/12"), ok("192.168.1.1/24", "ip:192.168.1.1/24"), ok("8.8.8.8/24", "ip:8.8.8.8/24"), ok("169.254.1.1/16", "ip:169.254.1.1/16"),
		ok("240.0.0.1/24", "ip:240.0.0.1/24"), ok("0.0.0.1/8", "ip:0.0.0.1/8"), ok("10.2.0.255/16", "ip:10.2.0.255/16"), ok("10.2.1.0/16", "ip:10.2.1.0/16"),
		no("255.255.255.255/8", isLast), no("0.0.0.0/8", "unspecified"), no("ip:0.0.0.0/24", "unspecified"), no("::/64", "unspecified"),
		ok("net:10.32.0.0/12", "net:10.32.0.0/12"), ok("net:10.32.0.0/24", "net:10.32.0.0/24"), ok("net:10.47.255.252/30", "net:10.47.255.252/30"),
		no("net:10.48.0.0/24", outside), no("net:10.31.255.0/24", outside), no("net:10.0.0.0/8", outside), no("net:10.32.0.0/11", outside), no("net:192.168.1.0/24", outside),
		no("net:0.0.0.0/8", outside), no("net:fd00::/64", outside), no("net:::/64", outside), no("net:10.32.1.0/24 net:10.48.1.0/24", `"net:10.48.1.0/24"`),
		// IPv6.
		ok("fd00::1/64", "ip:fd00::1/64"), ok("ip:fd00::1/64", "ip:fd00::1/64"), ok("ip:FD00::00A1/64", "ip:fd00::a1/64"),
		ok("fd00:0:0:0:0:0:0:1/64", "ip:fd00::1/64"), ok("fd00::10.43.1.1/64", "ip:fd00::a2b:101/64"), ok("fd00::ffff:ffff:ffff:ffff/64", "ip:fd00::ffff:ffff:ffff:ffff/64"),
		ok("fd00::3/126", "ip:fd00::3/126"), ok("fd00::1/126", "ip:fd00::1/126"), ok("2001:db8::1/1", "ip:2001:db8::1/1"), ok("1::/15", "ip:1::/15"),
		no("fd00::/64", isAnycast), no("fd00::/126", isAnycast), no("ip:fd00:1::/32", isAnycast+" fd00:1::/32"),
		no("net:fd00::1/64", hostBits+"fd00::/64"),
		// What shells and files make of it.
		no("$MESH_CIDR", noLength), no("${CIDR:-10.43.1.1/24}", noAddress), no("10.43.1.1/24\\n", noAddress), no("=10.43.1.1/24", noAddress), no("10.43.1.1/$LEN", noAddress),
		no("10.43.1.1-10.43.1.9/24", noAddress), no("10.43.1.1,10.43.1.2", noLength), no("web.mesh.internal/24", noAddress), no("02:00:00:00:00:01", noLength),
	}
}

// TestCIDR is K6: what becomes of a container for each value that its environment can have. The outcomes follow from the
// grammar in the README.
func TestCIDR(t *testing.T) {
	all := slices.Concat(everyLength(), everyFault(), byHand())
	good, seen := 0, map[string]bool{}
	for i, c := range all {
		seen[c.value] = true
		d := &slowDaemon{}
		ask, end := inBubble(t, d, nil)
		variable := []string{"MESH_CIDR", "WEAVE_CIDR"}[i%2]
		body, err := json.Marshal(map[string]any{"Image": "i", "Env": []string{"A=b", variable + "=" + c.value}})
		if err != nil {
			t.Fatal(err)
		}
		w := ask("/v1.41/containers/create?name=x", string(body))
		end()
		var doc struct{ Message string }
		if c.err != "" {
			_ = json.Unmarshal(w.Body.Bytes(), &doc)
			if w.Code != http.StatusBadRequest || !strings.HasPrefix(doc.Message, "meshd: "+variable+"=") || !strings.Contains(doc.Message, c.err) || len(d.done) > 0 {
				t.Errorf("%.90q: got %d %.300s, the daemon did %v, want a refusal with %q", c.value, w.Code, doc.Message, d.done, c.err)
			}
			if len(doc.Message) > 2000 {
				t.Errorf("%.90q: the message has %d bytes", c.value, len(doc.Message))
			}
			continue
		}
		good++
		if w.Code != http.StatusCreated {
			t.Errorf("%.90q: got %d %s", c.value, w.Code, w.Body)
			continue
		}
		var got created
		if err := json.Unmarshal(d.created, &got); err != nil {
			t.Fatal(err)
		}
		label, labelled := got.Labels[LabelAddrs]
		if slices.Equal(c.want, []string{"none"}) {
			if labelled {
				t.Errorf("%q: is to be attached at %q", c.value, label)
			}
			continue
		}
		var words []string
		specs, err := mesh.ParseAddrSpecs(label)
		for _, s := range specs {
			words = append(words, s.String())
		}
		if err != nil || !labelled || !slices.Equal(words, c.want) {
			t.Errorf("%q: attached at %q (%v), want %q", c.value, words, err, c.want)
		}
	}
	if t.Logf("%d values, %d of them good", len(seen), good); len(seen) < 500 {
		t.Error("too few")
	}
}
