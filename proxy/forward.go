package proxy

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// backend is the way to the daemon.
type backend struct {
	network, addr string
	transport     *http.Transport
	proxy         *httputil.ReverseProxy
	conns         *bound          // of clients
	via           string          // is added to each request, so that one of our own is known again
	run           context.Context // of Proxy.Run, which sets it before it serves
}

// errAway says that the daemon gave no answer.
var errAway = errors.New("no answer from the Docker daemon")

const (
	dialTimeout = 10 * time.Second
	copyBuffer  = 32 << 10 // bytes; what Docker's programs write at a time, and it stays in the processor's cache
)

func newBackend(cfg Config, log *slog.Logger) (*backend, error) {
	network, addr, err := splitEndpoint(cfg.Docker)
	if err != nil {
		return nil, fmt.Errorf("docker at %q: %w", cfg.Docker, err)
	}
	b := &backend{network: network, addr: addr, conns: newBound(cfg.maxConns), via: "1.1 meshd-" + rand.Text()}
	b.transport = &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return b.dialPlain(ctx) },
		TLSClientConfig:    cfg.ClientTLS,
		DisableCompression: true,
		IdleConnTimeout:    time.Minute,
	}
	scheme := "http"
	if cfg.ClientTLS != nil {
		scheme = "https"
	}
	host := "docker"
	if network == "tcp" {
		host = addr
	}
	target := &url.URL{Scheme: scheme, Host: host}
	b.proxy = &httputil.ReverseProxy{
		// Path and query go on as they were written, not as they decode.
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = target.Scheme, target.Host
			r.Out.URL.RawQuery = r.In.URL.RawQuery
			r.Out.Host = r.In.Host
		},
		Transport:     b.transport,
		FlushInterval: -1,
		BufferPool:    &bufferPool{},
		ErrorHandler:  b.unreachable,
		ErrorLog:      slog.NewLogLogger(log.Handler(), slog.LevelDebug), // streams that end early
	}
	return b, nil
}

func (b *backend) dialPlain(ctx context.Context) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	return d.DialContext(ctx, b.network, b.addr)
}

// dial connects as the transport does.
func (b *backend) dial(ctx context.Context) (net.Conn, error) {
	conn, err := b.dialPlain(ctx)
	if err != nil || b.transport.TLSClientConfig == nil {
		return conn, err
	}
	cfg := b.transport.TLSClientConfig.Clone()
	if host, _, err := net.SplitHostPort(b.addr); err == nil && cfg.ServerName == "" {
		cfg.ServerName = host
	}
	sealed := tls.Client(conn, cfg)
	if err := sealed.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return sealed, nil
}

// bufferPool keeps copying from growing the heap with each stream.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) Get() []byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, copyBuffer)
}

func (p *bufferPool) Put(b []byte) { p.pool.Put(&b) }

func (b *backend) unreachable(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has gone, or has closed its half and must not read an empty 200
	}
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		refuse(w, http.StatusRequestEntityTooLarge, "the request body is larger than %d bytes", tooLarge.Limit)
		return
	}
	refuse(w, http.StatusBadGateway, "Cannot connect to the Docker daemon at %s://%s. Is the docker daemon running? (%v)", b.network, b.addr, err)
}

// refuse answers as Docker does: a JSON object with a message.
func refuse(w http.ResponseWriter, code int, format string, args ...any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(map[string]string{"message": fmt.Sprintf(format, args...)})
}

// forward passes a request and its answer on. A connection that may turn into a raw stream gets one of its
// own towards the daemon, so that the ends of both directions stay apart, and so does one that moves much.
func (b *backend) forward(w http.ResponseWriter, r *http.Request) {
	switch {
	case mayHijack(r):
		b.hijack(w, r)
	case bulkPath.MatchString(r.URL.Path):
		b.bulk(w, r)
	default:
		b.proxy.ServeHTTP(w, r)
	}
}

// mayHijack reports whether the answer can be 101 or, to clients that do not ask for an upgrade, a raw stream.
func mayHijack(r *http.Request) bool {
	if r.Header.Get("Upgrade") != "" {
		return true
	}
	path := r.URL.Path
	return r.Method == http.MethodPost &&
		(strings.HasSuffix(path, "/attach") || strings.HasSuffix(path, "/start") && strings.Contains(path, "/exec/"))
}

// hijack lives as long as Run and not as r's context, which ends when the client closes its sending half,
// with an answer still to come.
func (b *backend) hijack(w http.ResponseWriter, r *http.Request) {
	up, err := b.dial(b.run)
	if err != nil {
		b.unreachable(w, r, err)
		return
	}
	defer up.Close()
	defer context.AfterFunc(b.run, func() { up.Close() })()
	out := r.Clone(b.run)
	out.Header.Del("Expect") // answered by the server when the body is read
	if out.Header.Get("User-Agent") == "" {
		out.Header["User-Agent"] = []string{""} // or Write would put its own
	}
	if err := out.Write(up); err != nil {
		b.unreachable(w, r, err)
		return
	}
	br := bufio.NewReader(up)
	resp, err := http.ReadResponse(br, r)
	if err != nil {
		b.unreachable(w, r, err)
		return
	}
	defer resp.Body.Close()
	raw := resp.StatusCode == http.StatusSwitchingProtocols ||
		resp.StatusCode == http.StatusOK && resp.ContentLength < 0 && len(resp.TransferEncoding) == 0
	if !raw {
		answer(w, resp)
		return
	}
	down, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		b.unreachable(w, r, err)
		return
	}
	defer b.conns.hijacked()
	defer down.Close()
	defer context.AfterFunc(b.run, func() { down.Close() })()
	head := *resp
	head.Body, head.ContentLength = nil, -1
	if err := writeHead(down, &head); err != nil {
		return
	}
	join(down, rw.Reader, up, br)
}

// writeHead writes the status line and headers of a response whose body is a raw stream.
func writeHead(w io.Writer, resp *http.Response) error {
	buf := bufio.NewWriter(w)
	fmt.Fprintf(buf, "HTTP/1.1 %s\r\n", resp.Status)
	resp.Header.Write(buf)
	buf.WriteString("\r\n")
	return buf.Flush()
}

// answer passes an ordinary response on.
func answer(w http.ResponseWriter, resp *http.Response) {
	h := w.Header()
	for k, v := range resp.Header {
		h[k] = v
	}
	w.WriteHeader(resp.StatusCode)
	if _, err := io.Copy(w, resp.Body); err != nil {
		panic(http.ErrAbortHandler) // so that what arrived does not pass for the whole
	}
}

// join copies both directions, what the readers have buffered first, and passes the end of each on as
// the end of that direction only.
func join(down net.Conn, fromDown *bufio.Reader, up net.Conn, fromUp *bufio.Reader) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		copyHalf(up, down, fromDown)
	}()
	copyHalf(down, up, fromUp)
	<-done
}

// copyHalf copies one direction and passes its end on.
func copyHalf(dst io.Writer, src io.Reader, buffered *bufio.Reader) {
	if n := buffered.Buffered(); n > 0 {
		head, _ := buffered.Peek(n) // cannot fail: it is there
		if _, err := dst.Write(head); err != nil {
			return
		}
	}
	if !passOn(dst, src) {
		io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, copyBuffer))
	}
	if half, ok := dst.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
}

// reply is an answer of the daemon to a question of the proxy's own.
type reply struct {
	code   int
	header http.Header
	body   []byte
}

// send passes the answer on to a client.
func (r *reply) send(w http.ResponseWriter) {
	h := w.Header()
	for name, values := range r.header {
		h[name] = values
	}
	h.Set("Content-Length", strconv.Itoa(len(r.body)))
	w.WriteHeader(r.code)
	w.Write(r.body)
}

// call asks the daemon something, in the API version of the client's request. An answer has at most
// maxAnswer bytes.
func (b *backend) call(ctx context.Context, method, path string) (*reply, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Via", b.via)
	if b.transport.TLSClientConfig != nil {
		req.URL.Scheme, req.URL.Host = "https", b.addr
	}
	resp, err := b.transport.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errAway, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errAway, err)
	}
	if len(body) > maxAnswer {
		err = fmt.Errorf("the daemon's answer to %s %s has more than %d bytes", method, path, maxAnswer)
	}
	return &reply{resp.StatusCode, resp.Header, body}, err
}
