package container

import (
	"strings"
	"testing"
)

// A container chooses its host name and what its /etc/hosts says. Neither makes a name outside the domain, nor lines
// in the file that are not ours to write.
func FuzzNames(f *testing.F) {
	f.Add("web", "mesh.internal", "127.0.0.1 localhost\n")
	f.Add("web.mesh.internal.", "", "# mesh: begin\n# mesh: was 1.2.3.4 web\n")
	f.Add("a\nb", "mesh.internal", "# mesh: end\n# mesh: begin")
	m := &Manager{cfg: Config{Domain: "mesh.internal."}}
	f.Fuzz(func(t *testing.T, host, domain, hosts string) {
		name := m.fqdn(host, domain)
		if name == "" {
			return
		}
		if !strings.HasSuffix(name, ".mesh.internal.") || strings.ContainsAny(name, " \t\r\n#") || name != strings.ToLower(name) || m.fqdn(name, "") != name {
			t.Fatalf("%q of %q gives %q", host, domain, name)
		}
		addrs := prefixes("10.32.0.1/12")
		once := editHosts(hosts, []string{strings.TrimSuffix(name, ".")}, addrs, nil)
		if want := "10.32.0.1\t" + strings.TrimSuffix(name, "."); !strings.Contains(once, want) {
			t.Errorf("%q: no %q in %q", hosts, want, once)
		}
	})
}
