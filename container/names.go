package container

import "strings"

// fqdn is the fully qualified name of a container with this host and domain name: lower case with the
// final dot, or "" if it is not a name in the mesh's domain. Docker splits what -h says in some versions
// and not in others.
func (m *Manager) fqdn(host, domain string) string {
	name := strings.Trim(host, ".")
	if domain = strings.Trim(domain, "."); domain != "" {
		name += "." + domain
	}
	name = strings.ToLower(name) + "."
	if m.inDomain(name) {
		return name
	}
	return ""
}

// inDomain reports whether a lower-case name with the final dot lies in the mesh's domain and is a host
// name (RFC 1123 2.1, and the underscore that people use).
func (m *Manager) inDomain(name string) bool {
	if m.cfg.Domain == "" || len(name) > 254 || !strings.HasSuffix(name, "."+m.cfg.Domain) {
		return false
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return false
			}
		}
	}
	return true
}
