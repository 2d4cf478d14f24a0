package proxy

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"meshd/mesh"
	"meshd/proxy/wait"
)

// theirs reads a create request as Docker's daemon does: one document from the start of the body, members
// regardless of case, and the command's two as an array or a string.
type theirs struct {
	*theirConfig
	HostConfig *theirHostConfig
}

type theirConfig struct {
	Hostname, Domainname, Image, User string
	Env                               []string
	Cmd, Entrypoint                   theirWords
	Labels                            map[string]string
	Tty                               bool
	ExposedPorts                      map[string]struct{}
}

type theirHostConfig struct {
	NetworkMode, UTSMode  string
	Binds, Dns, DnsSearch []string
	Privileged            bool
	Memory                int64
	ExtraHosts            []string
}

type theirWords []string

func (w *theirWords) UnmarshalJSON(b []byte) error {
	var list []string
	if err := json.Unmarshal(b, &list); err != nil {
		var one string
		if err := json.Unmarshal(b, &one); err != nil {
			return err
		}
		list = []string{one}
	}
	*w = list
	return nil
}

func readTheirs(b []byte) (t theirs, err error) {
	t.theirConfig = &theirConfig{}
	err = json.NewDecoder(bytes.NewReader(b)).Decode(&t)
	if t.HostConfig == nil {
		t.HostConfig = &theirHostConfig{}
	}
	return t, err
}

// runs is what the daemon makes of a request's command and an image's.
func (t theirs) runs(img image) (entry, cmd []string) {
	entry, cmd = t.Entrypoint, t.Cmd
	if len(entry) == 0 {
		if len(cmd) == 0 {
			cmd = img.Cmd
		}
		if entry == nil {
			entry = img.Entrypoint
		}
	}
	if len(entry) == 1 && entry[0] == "" {
		entry = nil
	}
	return entry, cmd
}

// asked is the address list that the container's environment will have, with the image's under it.
func (t theirs) asked(img image) (list string, ok bool) {
	var all []string
	for _, e := range slices.Concat(img.Env, t.Env) {
		name, _, set := strings.Cut(e, "=")
		all = slices.DeleteFunc(all, func(have string) bool { return strings.HasPrefix(have, name+"=") })
		if set {
			all = append(all, e)
		}
	}
	for _, name := range []string{"MESH_CIDR=", "WEAVE_CIDR="} {
		for _, e := range all {
			if value, ok := strings.CutPrefix(e, name); ok {
				return value, true
			}
		}
	}
	return "", false
}

type oneImage []byte

func (o oneImage) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(o))}, nil
}

// Whatever is taken, the daemon must read from it what was asked for, and nothing else beside what was added.
func FuzzCreate(f *testing.F) {
	const plain = `{"Config":{"Entrypoint":["/e"],"Cmd":["c"],"Env":["MESH_CIDR=net:10.5.0.0/16"]}}`
	f.Add([]byte(`{"Image":"a","Cmd":["x"],"HostConfig":{"Binds":["x:y"],"Memory":9007199254740993}}`), plain)
	f.Add([]byte(`{"image":"a","cmd":"x","entrypoint":[],"hostconfig":{"networkmode":"bridge"},"Unknown":{"a":1e400}}`), plain)
	f.Add([]byte(`{"Image":"a","Entrypoint":"","Env":["MESH_CIDR=none"],"Labels":{"meshd.addresses":"x"}}`), plain)
	f.Add([]byte("{\"Image\":\"a\",\"HostConfig\":{\"Dn\u017f\":[\"1.1.1.1\"],\"UTSMode\":\"host\"},\"Cmd\":[null]}"), `{"Config":{"Env":null}}`)
	f.Add([]byte(`{"Image":"a","Env":["MESH_CIDR"],"HostConfig":{"NetworkMode":"mine"}}`), plain)
	f.Add([]byte(`{"Image":"a","Env":["MESH_CIDR=none"]}`), `{"Config":{"Entrypoint":["/.meshd/wait","ethmesh"],"Cmd":["c"],"Labels":{"meshd.addresses":""}}}`)
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, body []byte, of string) { compareCreate(t, dir, body, of) })
}

// The same with requests that are put together from what matters.
func TestCreateAtRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	pick := func(all ...string) string { return all[rng.IntN(len(all))] }
	lists := []string{`null`, `[]`, `[""]`, `["a"]`, `["a","b"]`, `["` + wait.Path + `"]`, `["` + wait.Path + `","ethmesh","a"]`, `"a"`, `""`, `[null]`, `7`, `{}`}
	env := []string{`null`, `[]`, `["MESH_CIDR=none"]`, `["MESH_CIDR="]`, `["MESH_CIDR"]`, `["WEAVE_CIDR=net:10.2.0.0/16","MESH_CIDR"]`,
		`["MESH_CIDR=ip:10.2.1.1/24","WEAVE_CIDR=x"]`, `["MESH_CIDR=net:default","MESH_CIDR=net:10.9.0.0/16"]`, `["mesh_cidr=none"]`, `"MESH_CIDR=none"`}
	labels := []string{`null`, `{}`, `{"a":"b"}`, `{"` + LabelAddrs + `":"ip:10.0.0.1/8"}`, `{"` + strings.ToUpper(LabelAddrs) + `":"x","a":null}`, `[]`}
	modes := []string{`null`, `""`, `"default"`, `"bridge"`, `"none"`, `"host"`, `"Host"`, `"container:x"`, `"mine"`, `0`}
	member := func(name string, values ...string) string {
		if rng.IntN(3) == 0 {
			return ""
		}
		name = pick(name, name, name, strings.ToLower(name), strings.ToUpper(name), strings.ReplaceAll(name, "s", "\u017f"))
		return `"` + name + `":` + pick(values...)
	}
	object := func(members ...string) string {
		members = slices.DeleteFunc(members, func(m string) bool { return m == "" })
		rng.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
		return "{" + strings.Join(members, ",") + "}"
	}
	dir, taken := t.TempDir(), 0
	for range 3000 {
		host := object(member("NetworkMode", modes...), member("Binds", `null`, `["/a:/b"]`), member("Dns", `["1.1.1.1"]`, `[]`),
			member("DnsSearch", `["."]`, `null`), member("UTSMode", `"host"`, `""`), member("Memory", `9007199254740993`), member("New", `{"a":1e99}`))
		body := object(member("Image", `"i"`, `"i"`, `""`), member("Entrypoint", lists...), member("Cmd", lists...), member("Env", env...),
			member("Labels", labels...), member("Hostname", `"h"`, `""`), member("Domainname", `"d"`), member("HostConfig", host, host, host, "null"),
			member("User", `"u"`), member("Extra", `[{"b":[1,2]}]`), member("Privileged", `null`, `null`, `true`), member("Cmd", `["twice"]`, `null`))
		image := `{"Config":` + object(member("Entrypoint", lists...), member("Cmd", lists...), member("Env", env...), member("Labels", labels...)) + `}`
		if compareCreate(t, dir, []byte(body), image); t.Failed() {
			t.Fatalf("image %s", image)
		}
		if _, err := readTheirs([]byte(body)); err == nil {
			taken++
		}
	}
	if taken < 300 {
		t.Errorf("only %d requests were good", taken)
	}
}

func compareCreate(t *testing.T, dir string, body []byte, of string) {
	cfg := Config{
		Listen: []string{":0"}, Docker: "unix:///nowhere", WaitDir: dir, Ifname: "ethmesh",
		DNS: func() netip.AddrPort { return netip.MustParseAddrPort("172.17.0.1:53") }, DNSDomain: "mesh.internal.",
	}
	p, err := newProxy(cfg, &fakeContainers{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	p.backend.transport.RegisterProtocol("http", oneImage(of))
	out, err := p.rewriteCreate(t.Context(), body, "", "name")
	if err != nil {
		return
	}
	want, err := readTheirs(body)
	if err != nil {
		return // the daemon refuses it, now as before
	}
	got, err := readTheirs(out)
	if err != nil {
		t.Fatalf("%s became %s, which is refused: %v", body, out, err)
	}
	var doc struct{ Config *image }
	if json.Unmarshal([]byte(of), &doc) != nil || doc.Config == nil {
		doc.Config = &image{}
	}
	if want.Image == "" { // the daemon refuses it
		return
	}
	checkCreate(t, *doc.Config, want, got)
	if t.Failed() {
		t.Fatalf("%s became %s", body, out)
	}
	checkRest(t, body, out)
}

func checkCreate(t *testing.T, img image, want, got theirs) {
	list, asked := want.asked(img)
	specs, err := mesh.ParseAddrSpecs(list)
	if err != nil {
		t.Errorf("took the addresses %q", list)
	}
	mode := want.HostConfig.NetworkMode
	none := len(specs) == 1 && specs[0].Kind == mesh.AddrNone
	wanted := !none && mode != "host" && !strings.HasPrefix(mode, "container:") &&
		(asked || !networkMode(mode).isUsers())
	entry, cmd := want.runs(img)
	if waits(entry) {
		if entry = entry[min(2, len(entry)):]; len(entry)+len(cmd) == 0 {
			return // the waiter and nothing to wait for is nobody's wish
		}
	}
	newEntry, newCmd := got.runs(img)
	label, labelled := got.Labels[LabelAddrs]
	if wanted {
		if len(entry)+len(cmd) > 0 {
			if len(newEntry) < 2 || newEntry[0] != wait.Path {
				t.Fatalf("the entrypoint is %q", newEntry)
			}
			newEntry = newEntry[2:]
		}
		if !labelled || label != list {
			t.Errorf("label %q, want %q", label, list)
		}
		for _, x := range []struct{ was, is []string }{{want.HostConfig.Binds, got.HostConfig.Binds}, {want.HostConfig.Dns, got.HostConfig.Dns}} {
			if len(x.is) < len(x.was) || !slices.Equal(x.is[:len(x.was)], x.was) || len(x.is) > len(x.was)+1 {
				t.Errorf("%q became %q", x.was, x.is)
			}
		}
		if len(want.HostConfig.DnsSearch) > 0 && !slices.Equal(want.HostConfig.DnsSearch, got.HostConfig.DnsSearch) {
			t.Errorf("search list %q", got.HostConfig.DnsSearch)
		}
		if want.Hostname != "" && (got.Hostname != want.Hostname || got.Domainname != want.Domainname) {
			t.Errorf("host name %q %q", got.Hostname, got.Domainname)
		}
	} else {
		if labelled && label != "none" {
			t.Errorf("label %q, want none", label)
		}
		if want.Entrypoint != nil { // as it came
			entry, _ = want.runs(img)
		}
		got.Hostname = want.Hostname
	}
	if !slices.Equal(newEntry, entry) || !slices.Equal(newCmd, cmd) {
		t.Errorf("runs %q %q, want %q %q", newEntry, newCmd, entry, cmd)
	}
	for _, m := range []map[string]string{want.Labels, got.Labels} {
		delete(m, LabelAddrs)
	}
	if !maps.Equal(want.Labels, got.Labels) {
		t.Errorf("labels %q, want %q", got.Labels, want.Labels)
	}
}

// checkRest wants every other member to have arrived as it was.
func checkRest(t *testing.T, body, out []byte) {
	rest := func(b []byte) map[string]any {
		var all map[string]any
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.UseNumber()
		if err := dec.Decode(&all); err != nil {
			t.Fatal(err)
		}
		drop := func(m map[string]any, names ...string) {
			maps.DeleteFunc(m, func(name string, v any) bool {
				return v == nil || slices.ContainsFunc(names, func(n string) bool { return fold(n) == fold(name) })
			})
		}
		for name, value := range all {
			if host, ok := value.(map[string]any); ok && fold(name) == "hostconfig" {
				drop(host, "Binds", "Dns", "DnsSearch")
				delete(all, name)
				if len(host) > 0 {
					all["hostconfig"] = host
				}
				break
			}
		}
		drop(all, "Entrypoint", "Cmd", "Labels", "Hostname", "Domainname")
		return all
	}
	if was, is := rest(body), rest(out); !reflect.DeepEqual(was, is) {
		t.Fatalf("%s became %s", body, out)
	}
}

// Docker's answers to an inspect, and the settings that old clients send with a start.
func FuzzInspect(f *testing.F) {
	f.Add([]byte(`{"Id":"c0ffee","Config":{"Labels":{"meshd.addresses":"net:default"}},"NetworkSettings":{"IPAddress":"172.17.0.2"},"HostConfig":{"NetworkMode":"mine","Binds":["a:b"]}}`), []byte(`{"NetworkMode":"bridge","ExtraHosts":["a:1.2.3.4"]}`))
	f.Add([]byte(`{"id":"c0ffee","ID":"c2","networksettings":null}`), []byte(`{"networkmode":"host"}`))
	p, err := newProxy(Config{
		Listen: []string{":0"}, Docker: "unix:///nowhere", WaitDir: f.TempDir(), Ifname: "ethmesh",
		DNS: func() netip.AddrPort { return netip.MustParseAddrPort("172.17.0.1:53") }, DNSDomain: "mesh.internal.",
	}, &fakeContainers{}, slog.New(slog.DiscardHandler))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, answer, settings []byte) {
		if out, err := p.rewriteInspect(answer); err == nil && !json.Valid(out) && json.Valid(answer) {
			t.Errorf("%s became %s", answer, out)
		}
		var c container
		if json.Unmarshal(answer, &c) != nil {
			return
		}
		if out, err := p.rewriteStart(settings, &c); err == nil && !json.Valid(out) {
			t.Errorf("%s became %s", settings, out)
		}
	})
}
