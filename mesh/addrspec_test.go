package mesh

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestParseAddrSpec(t *testing.T) {
	for _, c := range []struct{ in, want, err string }{
		{"10.2.1.1/24", "ip:10.2.1.1/24", ""},
		{"ip:10.2.1.1/24", "ip:10.2.1.1/24", ""},
		{"ip:10.2.1.1/30", "ip:10.2.1.1/30", ""},
		{"ip:10.2.1.254/24", "ip:10.2.1.254/24", ""},
		{"net:10.2.1.0/24", "net:10.2.1.0/24", ""},
		{"net:10.2.1.4/30", "net:10.2.1.4/30", ""},
		{"net:default", "net:default", ""},
		{"none", "none", ""},
		{"fd00::1/64", "ip:fd00::1/64", ""},
		{"ip:FD00::ffff:ffff:ffff:ffff/64", "ip:fd00::ffff:ffff:ffff:ffff/64", ""},
		{"net:fd00:1::/64", "net:fd00:1::/64", ""},
		{"10.2.0.255/16", "ip:10.2.0.255/16", ""},

		{"", "", "empty"},
		{"10.2.1.1", "", "length of the subnet is missing"},
		{"ip:10.2.1.1", "", "length of the subnet is missing"},
		{"net:", "", "length of the subnet is missing"},
		{"ip:default", "", "length of the subnet is missing"},
		{"net:Default", "", "length of the subnet is missing"},
		{"NONE", "", "length of the subnet is missing"},
		{"10.2.1.1/", "", "not an address"},
		{"10.2.1/24", "", "not an address"},
		{"10.2.1.256/24", "", "not an address"},
		{"10.2.1.01/24", "", "not an address"},
		{"10.2.1.1/024", "", "not an address"},
		{"10.2.1.1/+24", "", "not an address"},
		{"10.2.1.1/33", "", "not an address"},
		{"10.2.1.1/-1", "", "not an address"},
		{"10.2.1.1/24/24", "", "not an address"},
		{"10.2.1.1 /24", "", "not an address"},
		{"net:net:10.2.1.0/24", "", "not an address"},
		{"ip:ip:10.2.1.1/24", "", "not an address"},
		{"host:10.2.1.1/24", "", "not an address"},
		{"fe80::1%eth0/64", "", "not an address"},
		{"10.2.1.0/24", "", "is the network address of 10.2.1.0/24"},
		{"10.2.1.4/30", "", "is the network address of 10.2.1.4/30"},
		{"10.2.1.255/24", "", "is the broadcast address of 10.2.1.0/24"},
		{"10.2.1.7/30", "", "is the broadcast address of 10.2.1.4/30"},
		{"10.2.1.1/31", "", "a /30"},
		{"10.2.1.1/32", "", "a /30"},
		{"net:10.2.1.0/31", "", "a /30"},
		{"net:10.2.1.1/32", "", "a /30"},
		{"net:10.2.1.1/24", "", "the subnet is net:10.2.1.0/24"},
		{"net:10.2.1.5/30", "", "the subnet is net:10.2.1.4/30"},
		{"net:0.0.0.0/0", "", "whole world"},
		{"10.0.0.1/0", "", "whole world"},
		{"0.0.0.0/8", "", "unspecified"},
		{"127.0.0.1/8", "", "loopback"},
		{"net:224.0.0.0/24", "", "multicast"},
		{"239.1.1.1/24", "", "multicast"},
		{"fd00::/64", "", "anycast"},
		{"fd00::1/127", "", "a /126"},
		{"fd00::1/128", "", "a /126"},
		{"net:fd00::1/64", "", "the subnet is net:fd00::/64"},
		{"fe80::1/64", "", "link-local"},
		{"ff02::1/64", "", "multicast"},
		{"::1/64", "", "loopback"},
		{"::ffff:10.2.1.1/120", "", "IPv4"},
		{strings.Repeat("1", 100), "", "too long"},
	} {
		got, err := ParseAddrSpec(c.in)
		if c.err == "" {
			if err != nil || got.String() != c.want {
				t.Errorf("ParseAddrSpec(%q) = %v, %v, want %v", c.in, got, err, c.want)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("ParseAddrSpec(%q) = %v, %v, want an error with %q", c.in, got, err, c.err)
		}
	}
}

func TestParseAddrSpecs(t *testing.T) {
	for _, c := range []struct {
		in   string
		want []string // nil: an error
	}{
		{"", []string{}},
		{" \t ", []string{}},
		{"none", []string{"none"}},
		{"net:default  ip:10.2.1.1/24\tfd00::1/64", []string{"net:default", "ip:10.2.1.1/24", "ip:fd00::1/64"}},
		{"10.2.1.1/24 ip:10.2.1.1/24", []string{"ip:10.2.1.1/24", "ip:10.2.1.1/24"}},
		{"10.2.1.1/24 net:default 10.2.1.1/16", nil},
		{"none net:default", nil},
		{"10.2.1.1/24 10.2.1.0/24", nil},
		{strings.Repeat("net:default ", 65), nil},
	} {
		specs, err := ParseAddrSpecs(c.in)
		if c.want == nil {
			if err == nil {
				t.Errorf("ParseAddrSpecs(%q) = %v, want an error", c.in, specs)
			}
			continue
		}
		got := []string{}
		for _, s := range specs {
			got = append(got, s.String())
		}
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("ParseAddrSpecs(%q) = %v, %v, want %v", c.in, got, err, c.want)
		}
	}
}

func TestLastAddr(t *testing.T) {
	for in, want := range map[string]string{
		"10.2.1.9/24": "10.2.1.255", "10.32.0.0/12": "10.47.255.255", "10.0.0.5/30": "10.0.0.7",
		"10.0.0.5/32": "10.0.0.5", "fd00::/64": "fd00::ffff:ffff:ffff:ffff",
	} {
		if got := LastAddr(netip.MustParsePrefix(in)); got.String() != want {
			t.Errorf("LastAddr(%s) = %v, want %s", in, got, want)
		}
	}
}

func FuzzParseAddrSpecs(f *testing.F) {
	for _, s := range []string{"", "none", "net:default", "10.2.1.1/24 net:10.2.1.0/24", "ip:fd00::1/64", "net:/", "ip:::/0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		specs, err := ParseAddrSpecs(s)
		if err != nil {
			return
		}
		for _, spec := range specs {
			again, err := ParseAddrSpec(spec.String())
			if err != nil || again != spec {
				t.Errorf("%q: %v parses to %v, %v", s, spec, again, err)
			}
		}
	})
}
