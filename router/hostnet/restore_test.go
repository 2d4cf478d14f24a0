package hostnet

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"meshd/mesh"
)

func TestRestore(t *testing.T) {
	h, ns := newHost(t)
	a, b := newNamespace(t), newNamespace(t)
	for i, inside := range []*os.File{a, b} {
		if err := h.AttachPort(inside, testPort(i+1, fmt.Sprintf("10.2.1.%d/24", i+1))); err != nil {
			t.Fatal(err)
		}
	}
	tap, err := h.OpenTAP(1)
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	spec := BridgeSpec{MTU: 1400, MAC: mesh.MAC{2, 0, 0, 0, 0, 1}}
	for _, c := range []string{
		"ip link del mesh", "ip link set mesh-tap nomaster", "ip link set " + h.HostEnd(testPort(1).Owner) + " nomaster",
		"ip link set mesh name other", "ip link set mesh-tap name other", // renamed under us
	} {
		run(t, ns, c)
		if s, err := h.State(); err != nil || len(s.Missing) == 0 {
			t.Errorf("%s: state is %+v, %v", c, s, err)
		}
		for range 2 {
			if err := h.Restore(spec); err != nil {
				t.Fatalf("%s: %v", c, err)
			}
		}
		if s, err := h.State(); err != nil || len(s.Missing) > 0 {
			t.Errorf("%s: restored state is %+v, %v", c, s, err)
		}
		wantLinks(t, ns, "mesh", "mesh-tap", h.HostEnd(testPort(1).Owner), h.HostEnd(testPort(2).Owner))
		eventually(t, "ping after "+c, func() bool { return pings(a, "10.2.1.2") })
	}
}

// TestReopenTAP removes the TAP while somebody reads from it.
func TestReopenTAP(t *testing.T) {
	h, ns := newHost(t)
	inside := newNamespace(t)
	if err := h.AttachPort(inside, testPort(1, "10.2.1.1/24")); err != nil {
		t.Fatal(err)
	}
	tap, err := h.OpenTAP(1)
	if err != nil {
		t.Fatal(err)
	}
	q := tap.Queues()[0]
	ended := make(chan error, 1)
	frames := make(chan bool, 1)
	go func() {
		buf := make([]byte, 70000)
		for {
			switch _, err := q.Read(buf); {
			case errors.Is(err, os.ErrClosed):
				ended <- err
				return
			case err == nil:
				_, _ = q.TryRead(buf)
				select {
				case frames <- true:
				default:
				}
			default:
				<-time.After(time.Millisecond) // as its user does: the device may come back
			}
		}
	}()
	for range 3 {
		for range 2 {
			if err := h.ReopenTAP(tap); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case <-frames: // from before
		default:
		}
		eventually(t, "a frame from the bridge", func() bool {
			pings(inside, "10.2.1.9") // nobody: its ARP is flooded
			return len(frames) > 0
		})
		run(t, ns, "ip link del mesh-tap")
	}
	if err := h.ReopenTAP(tap); err != nil {
		t.Fatal(err)
	}
	if err := tap.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read after Close: %v", err)
	}
	wantLinks(t, ns, "mesh", "mesh-tap", h.HostEnd(testPort(1).Owner))
}

func TestPortRenamed(t *testing.T) {
	h, ns := newHost(t)
	inside := newNamespace(t)
	for range 2 {
		if err := h.AttachPort(inside, testPort(1, "10.2.1.1/24")); err != nil {
			t.Fatal(err)
		}
		wantLinks(t, ns, "mesh", h.HostEnd(testPort(1).Owner))
		run(t, ns, "ip link set "+h.HostEnd(testPort(1).Owner)+" name other")
	}
	if s, err := h.State(); err != nil || len(s.Foreign) != 1 || len(s.Ports) != 0 {
		t.Errorf("state is %+v, %v", s, err)
	}
	// The container may call its end as it likes.
	if err := h.AttachPort(inside, testPort(1, "10.2.1.1/24")); err != nil {
		t.Fatal(err)
	}
	run(t, inside, "ip link set ethmesh down")
	run(t, inside, "ip link set ethmesh name mine")
	if err := h.AttachPort(inside, testPort(1, "10.2.1.1/24")); err != nil {
		t.Fatal(err)
	}
	wantLinks(t, inside, "mine")
}

func TestMain(m *testing.M) {
	if os.Getenv("HOSTNET_CHILD") != "" {
		fmt.Println(attachForever())
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// attachForever is the child of TestAttachKilled: it attaches and detaches until it is killed.
func attachForever() error {
	hostNS, ns := os.NewFile(3, "host"), os.NewFile(4, "inside")
	var h *Host
	err := inNamespace(hostNS, func() (err error) {
		h, err = Open(Config{})
		return err
	})
	for p := testPort(1, "10.2.1.1/24", "fd00::1/64"); err == nil; {
		if err = h.AttachPort(ns, p); err != nil {
			break
		}
		if err = h.RemoveAddrs(ns, p.Owner, p.Addrs[1:]); err != nil {
			break
		}
		err = h.DetachPort(p.Owner)
	}
	return err
}

// kill -9 at random moments of attaching and detaching; the next one completes whatever was left.
func TestAttachKilled(t *testing.T) {
	h, hostNS := newHost(t)
	ns := newNamespace(t)
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 30 {
		var out bytes.Buffer
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), "HOSTNET_CHILD=1")
		child.ExtraFiles = []*os.File{hostNS, ns}
		child.Stdout, child.Stderr = &out, &out
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.NewTimer(time.Duration(10+rnd.IntN(60)) * time.Millisecond)
		<-timer.C
		child.Process.Kill()
		if err := child.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("child: %v\n%s", err, out.String())
		}
		if err := h.AttachPort(ns, testPort(1, "10.2.1.1/24", "fd00::1/64")); err != nil {
			t.Fatal(err)
		}
		list, err := h.Ports()
		if err != nil || len(list) != 1 || fmt.Sprint(list[0].Addrs) != "[10.2.1.1/24 fd00::1/64]" || list[0].MAC != testPort(1).MAC {
			t.Fatalf("ports are %+v, %v", list, err)
		}
		if s, err := h.State(); err != nil || len(s.Missing) != 1 { // the TAP, which nobody made
			t.Fatalf("state is %+v, %v", s, err)
		}
		if rnd.IntN(2) == 0 {
			if err := h.DetachPort(testPort(1).Owner); err != nil {
				t.Fatal(err)
			}
			wantLinks(t, ns)
		}
	}
}
