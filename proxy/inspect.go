package proxy

import (
	"net/http"
)

// inspect shows the mesh's address of an attached container where Docker shows its own.
func (p *Proxy) inspect(w http.ResponseWriter, r *http.Request) {
	path := r.URL.EscapedPath()
	if r.URL.RawQuery != "" {
		path += "?" + r.URL.RawQuery
	}
	answer, err := p.backend.call(r.Context(), http.MethodGet, path)
	if err != nil {
		p.backend.unreachable(w, r, err)
		return
	}
	if answer.code == http.StatusOK {
		// What cannot be rewritten is shown as Docker shows it.
		if changed, err := p.rewriteInspect(answer.body); err == nil {
			answer.body = changed
		} else {
			p.log.Debug("an inspect answer stays as it is", "err", err)
		}
	}
	answer.send(w)
}

func (p *Proxy) rewriteInspect(body []byte) ([]byte, error) {
	doc, err := parseObject(body)
	if err != nil {
		return nil, err
	}
	var id string
	if _, err := doc.get("Id", &id); err != nil {
		return nil, err
	}
	mac, addrs, ok := p.containers.Interface(id)
	if !ok || len(addrs) == 0 {
		return body, nil
	}
	settings, err := doc.child("NetworkSettings")
	if err != nil {
		return nil, err
	}
	for _, m := range []struct {
		name  string
		value any
	}{
		{"MacAddress", mac.String()},
		{"IPAddress", addrs[0].Addr().String()},
		{"IPPrefixLen", addrs[0].Bits()},
	} {
		if err := settings.set(m.name, m.value); err != nil {
			return nil, err
		}
	}
	if err := doc.set("NetworkSettings", settings); err != nil {
		return nil, err
	}
	return doc.encode(), nil
}
