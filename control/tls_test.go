package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// authority signs certificates and writes them with their keys to dir as NAME.pem and NAME-key.pem.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	a := &authority{dir: t.TempDir()}
	a.cert, a.key = a.make(t, name, true)
	return a
}

func (a *authority) make(t *testing.T, name string, isCA bool) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: isCA, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := a.cert, a.key
	if isCA {
		parent, signer = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + ".pem":     {Type: "CERTIFICATE", Bytes: der},
		name + "-key.pem": {Type: "EC PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(filepath.Join(a.dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

func TestTLS(t *testing.T) {
	ours, theirs := newAuthority(t, "ca"), newAuthority(t, "ca")
	ours.make(t, "server", false)
	ours.make(t, "client", false)
	theirs.make(t, "client", false)
	f := &fake{report: sample(t)}
	s := start(t, Config{HTTPAddr: "127.0.0.1:0", CACert: ours.file("ca.pem"), Cert: ours.file("server.pem"), Key: ours.file("server-key.pem")}, f.backends())
	addr := s.Addr(1).String()
	call := func(cfg ClientConfig) error {
		cfg.Addr = addr
		c, err := NewClient(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return c.Connect(t.Context(), []string{"host2"}, false)
	}
	if err := call(ClientConfig{CACert: ours.file("ca.pem"), Cert: ours.file("client.pem"), Key: ours.file("client-key.pem")}); err != nil {
		t.Errorf("with our certificate: %v", err)
	}
	before := len(f.log())
	for what, cfg := range map[string]ClientConfig{
		"another authority's client": {CACert: ours.file("ca.pem"), Cert: theirs.file("client.pem"), Key: theirs.file("client-key.pem")},
		"another authority's server": {CACert: theirs.file("ca.pem"), Cert: ours.file("client.pem"), Key: ours.file("client-key.pem")},
		"no TLS":                     {},
	} {
		if err := call(cfg); err == nil {
			t.Errorf("%s: no error", what)
		} else if answer := new(Error); cfg.Cert != "" && errors.As(err, &answer) {
			t.Errorf("%s: was answered %v", what, err)
		}
	}
	if got := len(f.log()); got != before {
		t.Errorf("a refused client came through: %q", f.log())
	}
	for _, cfg := range []ClientConfig{
		{CACert: "/none", Cert: ours.file("client.pem"), Key: ours.file("client-key.pem")},
		{CACert: ours.file("client-key.pem"), Cert: ours.file("client.pem"), Key: ours.file("client-key.pem")},
		{CACert: ours.file("ca.pem"), Cert: ours.file("client.pem"), Key: "/none"},
	} {
		cfg.Addr = addr
		if _, err := NewClient(cfg); err == nil {
			t.Errorf("%+v: no error", cfg)
		}
	}
}
