package fastdp

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// An old layout whose structures have the fields in another order, with some missing and some that are
// no more: what is common is carried over.
func TestMigrate(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	old := layoutDir(dir, 7)
	if err := os.Mkdir(old, 0o700); err != nil {
		t.Fatal(err)
	}
	word := &btf.Int{Name: "unsigned int", Size: 4}
	four := &btf.Array{Index: word, Type: word, Nelems: 4}
	peer := &btf.Struct{Name: "peer", Size: 44, Members: []btf.Member{
		{Name: "to", Type: four, Offset: 0},
		{Name: "gone", Type: word, Offset: 128},
		{Name: "from", Type: four, Offset: 160},
		{Name: "flags", Type: word, Offset: 288},
		{Name: "used", Type: word, Offset: 320}, // has another size today
	}}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "peers", Type: ebpf.Array, KeySize: 4, ValueSize: 44, MaxEntries: 64, Key: word, Value: peer})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Put(uint32(9), [11]uint32{1, 2, 3, 4, 99, 5, 6, 7, 8, peerKnown, 77}); err != nil {
		t.Fatal(err)
	}
	if err := m.Pin(filepath.Join(old, "peers")); err != nil {
		t.Fatal(err)
	}
	o, err := openObjects(dir, 8)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	if o.lost != nil {
		t.Fatal(o.lost)
	}
	var got bpfPeer
	if err := o.Peers.Lookup(uint32(9), &got); err != nil {
		t.Fatal(err)
	}
	if want := (bpfPeer{Flags: peerKnown, To: [4]uint32{1, 2, 3, 4}, From: [4]uint32{5, 6, 7, 8}}); got != want || !o.adopted {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if entries, err := os.ReadDir(layoutDir(dir, 8)); err != nil || len(entries) != 8 {
		t.Errorf("pins: %v, %v", entries, err)
	}
	// Garbage that a meshd left which died half way is no obstacle.
	if err := os.Mkdir(layoutDir(dir, 9)+"-new", 0o700); err != nil {
		t.Fatal(err)
	}
	again, err := openObjects(dir, 9)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := again.Peers.Lookup(uint32(9), &got); err != nil || got.Flags != peerKnown {
		t.Errorf("got %+v, %v", got, err)
	}
}
