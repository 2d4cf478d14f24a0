package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

func mustOpen(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t *testing.T, s *Store, key, value string) {
	t.Helper()
	if err := s.Put("b", map[string][]byte{key: []byte(value)}); err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "deep", "state.db")
	s := mustOpen(t, path)
	if v, err := s.Get("b", "k"); v != nil || err != nil {
		t.Errorf("absent key: got %q, %v, want nil, nil", v, err)
	}
	put(t, s, "k", "v")
	put(t, s, "empty", "")
	put(t, s, "gone", "x")
	if err := s.Put("b", map[string][]byte{"gone": nil}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := s.Get("b", "k"); !errors.Is(err, ErrClosed) {
		t.Errorf("Get after Close: got %v, want ErrClosed", err)
	}
	s = mustOpen(t, path)
	all, err := s.All("b")
	if err != nil || len(all) != 2 || string(all["k"]) != "v" || all["empty"] == nil {
		t.Errorf("after reopening: got %q, %v", all, err)
	}
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700 | os.ModeDir} {
		if info, err := os.Stat(p); err != nil || info.Mode() != want {
			t.Errorf("%s: got mode %v, %v, want %v", p, info.Mode(), err, want)
		}
	}
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".new-*"))
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestSecondOpenerIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := mustOpen(t, path)
	start := time.Now()
	_, err := Open(path)
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v, want ErrLocked naming %s", err, path)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v, want under 2 s", took)
	}
	put(t, s, "k", "the first one still works")
}

// TestDamage spoils a state file in many ways. Each must be reported as damage (or be harmless), and
// the file must be left as it was.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "good.db")
	s := mustOpen(t, path)
	want := make(map[string]string)
	for i := range 300 {
		k, v := fmt.Sprintf("key%03d", i), strings.Repeat(fmt.Sprint(i), 40)
		want[k] = v
		put(t, s, k, v)
	}
	s.Close()
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	var bads [][]byte
	for _, n := range []int{0, 1, 100, 4096, 8191, 8192, 12288, len(good) / 2, len(good) - 1} {
		bads = append(bads, good[:n])
	}
	bads = append(bads, bytes.Repeat([]byte{0}, len(good)), bytes.Repeat([]byte{0xff}, len(good)), []byte("{\"json\": true}"))
	for range 150 {
		bad := bytes.Clone(good)
		for range 1 + rng.IntN(8) {
			bad[rng.IntN(len(bad))] ^= byte(1 + rng.IntN(255))
		}
		bads = append(bads, bad)
	}
	for range 50 { // whole pages
		bad := bytes.Clone(good)
		p := rng.IntN(len(bad)/4096) * 4096
		for i := range 4096 {
			bad[p+i] = byte(rng.Uint32())
		}
		bads = append(bads, bad)
	}
	refused := 0
	for i, bad := range bads {
		path := filepath.Join(dir, fmt.Sprintf("bad%d.db", i))
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(path)
		if err != nil {
			refused++
			if !strings.Contains(err.Error(), path) {
				t.Errorf("case %d: %v does not name the file", i, err)
			}
			if now, _ := os.ReadFile(path); !bytes.Equal(now, bad) {
				t.Errorf("case %d: the damaged file was changed", i)
			}
			continue
		}
		all, err := s.All("b")
		if err == nil && len(all) != len(want) && len(all) != len(want)-1 { // -1: the older of two good roots
			t.Errorf("case %d: opened with %d of %d keys and no error", i, len(all), len(want))
		}
		for k, v := range all {
			if want[k] != string(v) {
				t.Errorf("case %d: %s has a wrong value and no error", i, k)
			}
		}
		s.Close()
	}
	t.Logf("%d of %d refused, the rest harmless", refused, len(bads))
	if refused < 15 {
		t.Errorf("only %d refused: the checks do nothing", refused)
	}
}

func TestNewerSchemaIsRefusedUntouched(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := mustOpen(t, path)
	s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte(metaBucket)).Put([]byte(schemaKey), binary.BigEndian.AppendUint32(nil, Schema+1))
	})
	s.Close()
	before, _ := os.ReadFile(path)
	if _, err := Open(path); !errors.Is(err, ErrNewer) {
		t.Errorf("got %v, want ErrNewer", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("the newer file was changed")
	}
}

// TestFullDisk fills a 256 KiB file system: Put must fail, what was acknowledged must stay, and once
// there is room again Put must work without reopening. The same for a read-only remount.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	path := filepath.Join(dir, "state.db")
	s := mustOpen(t, path)
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	acked := 0
	var err error
	for acked < 10_000 {
		if err = s.Put("b", map[string][]byte{fmt.Sprintf("%05d", acked): make([]byte, 1000)}); err != nil {
			break
		}
		acked++
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("got %v after %d, want no space left on device", err, acked)
	}
	for range 5 {
		if err := s.Put("b", map[string][]byte{"more": make([]byte, 60_000)}); err == nil {
			t.Fatal("Put succeeded on a full disk")
		}
	}
	check := func(s *Store) {
		t.Helper()
		all, err := s.All("b")
		if err != nil {
			t.Fatal(err)
		}
		for i := range acked {
			if all[fmt.Sprintf("%05d", i)] == nil {
				t.Fatalf("acknowledged key %d of %d is gone", i, acked)
			}
		}
	}
	check(s)
	os.Remove(ballast)
	put(t, s, "after", "room again")
	check(s)
	s.Close()
	s = mustOpen(t, path)
	check(s)
	put(t, s, "writes", "again")
}

// TestKillAtRandomPoints kills a writing process 40 times and demands every value that it had
// acknowledged on its standard output.
func TestKillAtRandomPoints(t *testing.T) {
	if path := os.Getenv("STORE_TEST_WRITER"); path != "" {
		s, err := Open(path)
		if err != nil {
			fmt.Println("error", err)
			os.Exit(3)
		}
		start, _ := s.All("b")
		for i := len(start); ; i++ {
			if err := s.Put("b", map[string][]byte{strconv.Itoa(i): []byte(strings.Repeat("x", i%3000))}); err != nil {
				os.Exit(4)
			}
			fmt.Println(i)
		}
	}
	rounds := 40
	if testing.Short() {
		rounds = 5
	}
	path := filepath.Join(t.TempDir(), "state.db")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	last := -1
	for range rounds {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKillAtRandomPoints$")
		cmd.Env = append(os.Environ(), "STORE_TEST_WRITER="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(30+rng.IntN(60))*time.Millisecond, func() { cmd.Process.Kill() })
		var buf bytes.Buffer
		buf.ReadFrom(out)
		cmd.Wait()
		timer.Stop()
		for line := range strings.Lines(buf.String()) {
			if n, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && strings.HasSuffix(line, "\n") {
				last = max(last, n)
			} else if strings.HasPrefix(line, "error") {
				t.Fatalf("the writer: %s", line)
			}
		}
		s, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		all, err := s.All("b")
		if err != nil {
			t.Fatal(err)
		}
		for i := range last + 1 {
			if len(all[strconv.Itoa(i)]) != i%3000 {
				t.Fatalf("acknowledged value %d of %d is gone", i, last)
			}
		}
		s.Close()
	}
	t.Logf("%d acknowledged values over %d kills, all there", last+1, rounds)
}

func FuzzOpen(f *testing.F) {
	dir := f.TempDir()
	path := filepath.Join(dir, "seed.db")
	s, err := Open(path)
	if err != nil {
		f.Fatal(err)
	}
	s.Put("b", map[string][]byte{"k": []byte("v")})
	s.Close()
	good, _ := os.ReadFile(path)
	f.Add(0, []byte{0})
	f.Add(4096, []byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, at int, patch []byte) {
		bad := bytes.Clone(good)
		if at < 0 || at >= len(bad) {
			return
		}
		copy(bad[at:], patch)
		path := filepath.Join(t.TempDir(), "state.db")
		os.WriteFile(path, bad, 0o600)
		s, err := Open(path)
		if err != nil {
			return
		}
		defer s.Close()
		if v, err := s.Get("b", "k"); err == nil && v != nil && string(v) != "v" {
			t.Errorf("got %q without an error", v)
		}
	})
}

func BenchmarkPut(b *testing.B) {
	for _, n := range []int{1000, 65000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			s, err := Open(filepath.Join(b.TempDir(), "state.db"))
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			kv := make(map[string][]byte)
			for i := range n {
				kv[fmt.Sprintf("%064d", i)] = make([]byte, 20)
			}
			if err := s.Put("b", kv); err != nil {
				b.Fatal(err)
			}
			i := 0
			for b.Loop() {
				i++
				if err := s.Put("b", map[string][]byte{fmt.Sprintf("%064d", i%n): make([]byte, 20)}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// S3: fdatasync alone fails, everything else works, as when the disk is gone under the page cache. The system call of one
// thread is made to fail by a seccomp filter (seccomp(2), Linux 3.17), which ends with the thread.
func TestSyncFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := mustOpen(t, path)
	put(t, s, "before", "kept")
	for range 20 { // again and again; nothing piles up, nothing is lost
		err := withFailing(unix.SYS_FDATASYNC, func() error { return s.Put("b", map[string][]byte{"big": make([]byte, 100_000)}) })
		if !errors.Is(err, syscall.EIO) {
			t.Fatalf("got %v, want an input/output error", err)
		}
	}
	if got, err := s.Get("b", "before"); err != nil || string(got) != "kept" {
		t.Errorf("reading meanwhile: %q, %v", got, err)
	}
	put(t, s, "after", "synced again") // on a thread without the filter
	s.Close()
	s = mustOpen(t, path)
	for key, want := range map[string]string{"before": "kept", "after": "synced again"} {
		if got, err := s.Get("b", key); err != nil || string(got) != want {
			t.Errorf("%s after reopening: %q, %v", key, got, err)
		}
	}
	if err := withFailing(unix.SYS_FDATASYNC, func() error { return create(filepath.Join(t.TempDir(), "new.db")) }); !errors.Is(err, syscall.EIO) {
		t.Errorf("a new file that cannot be synced: got %v", err)
	}
}

// withFailing runs f on a thread on which one system call fails with EIO.
func withFailing(call uint32, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		filter := []unix.SockFilter{
			{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // seccomp_data.nr
			{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: call, Jf: 1},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EIO)},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		}
		prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			done <- err
			return
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
			done <- fmt.Errorf("seccomp: %w", errno)
			return
		}
		done <- f()
	}()
	return <-done
}
