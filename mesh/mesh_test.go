package mesh

import (
	"bytes"
	"cmp"
	"encoding/json"
	"testing"
)

func TestParsePeerName(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"7a:9f:eb:b6:0c:6e", "7a:9f:eb:b6:0c:6e"},
		{"7A:9F:EB:B6:C:6E", "7a:9f:eb:b6:0c:6e"},
		{"::1", "00:00:00:00:00:01"},
		{"1::", "01:00:00:00:00:00"},
		{"1::2:3", "01:00:00:00:02:03"},
		{"::", ""}, {"", ""}, {"1", ""}, {"1:2:3:4:5:6:7", ""}, {"1:2:3:4:5:6::", ""},
		{"::1::2", ""}, {"1:2:3:4:5:100", ""}, {"1:2:3:4:5:g", ""}, {"1:2:3:4:5:+1", ""},
		{":1:2:3:4:5:6", ""}, {"1:2:3:4:5:6 ", ""},
	} {
		got, err := ParsePeerName(c.in)
		if c.want == "" {
			if err == nil {
				t.Errorf("ParsePeerName(%q) = %v, want an error", c.in, got)
			}
			continue
		}
		if err != nil || got.String() != c.want {
			t.Errorf("ParsePeerName(%q) = %v, %v, want %v", c.in, got, err, c.want)
		}
	}
}

func TestParseMAC(t *testing.T) {
	if m, err := ParseMAC("02:42:ac:11:00:02"); err != nil || m.String() != "02:42:ac:11:00:02" {
		t.Errorf("got %v, %v", m, err)
	}
	for _, in := range []string{"", "::1", "02:42:ac:11:00", "02-42-ac-11-00-02"} {
		if m, err := ParseMAC(in); err == nil {
			t.Errorf("ParseMAC(%q) = %v, want an error", in, m)
		}
	}
}

func TestTextRoundTrip(t *testing.T) {
	type doc struct {
		P PeerName
		M MAC
		K map[PeerName]int
	}
	in := doc{P: PeerName{1, 2, 3, 4, 5, 6}, M: MAC{2, 0xff}, K: map[PeerName]int{{9}: 1}}
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var out doc
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	if out.P != in.P || out.M != in.M || out.K[PeerName{9}] != 1 {
		t.Errorf("got %+v, want %+v", out, in)
	}
	var zero PeerName
	if b, _ = json.Marshal(zero); json.Unmarshal(b, &zero) != nil {
		t.Errorf("the zero name does not survive JSON: %s", b)
	}
}

func FuzzParsePeerName(f *testing.F) {
	f.Add("::1")
	f.Add("7a:9f:eb:b6:0c:6e")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePeerName(s)
		if err != nil {
			return
		}
		if q, err := ParsePeerName(p.String()); err != nil || p != q {
			t.Errorf("%q: got %v, %v, want %v", s, q, err, p)
		}
	})
}

// Names are in the order of their bytes, whichever differs.
func TestPeerNameCompare(t *testing.T) {
	names := []PeerName{{}, {5: 1}, {5: 0xff}, {4: 1}, {3: 0xff, 5: 1}, {0: 1, 5: 0xff}, {0: 0x80}, {0: 0xff, 5: 1}}
	for i, a := range names {
		for j, b := range names {
			if got, want := a.Compare(b), bytes.Compare(a[:], b[:]); got != want || got != cmp.Compare(i, j) {
				t.Errorf("%v and %v: got %d, want %d", a, b, got, want)
			}
		}
	}
}
