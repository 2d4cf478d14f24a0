package probe

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"time"
)

// Transfer is the outcome of a stream.
type Transfer struct {
	Bytes    int64
	Time     time.Duration
	MaxStall time.Duration // longest time in which nothing arrived
}

func (t Transfer) String() string {
	return fmt.Sprintf("%d bytes in %v, %.2f Gb/s, longest stall %v", t.Bytes, t.Time.Round(time.Millisecond),
		float64(t.Bytes)*8/float64(t.Time.Nanoseconds()), t.MaxStall.Round(time.Millisecond))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Stream sends that many bytes of seeded noise over dial's connection to listener's, and compares the
// checksums of what was sent and what arrived. It ends with ctx, and then says how far it came.
func Stream(ctx context.Context, listener net.Listener, dial func() (net.Conn, error), bytes int64, seed uint64) (Transfer, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		t   Transfer
		sum uint32
		err error
	}
	received := make(chan outcome, 1)
	go func() {
		var o outcome
		defer func() { received <- o }()
		conn, err := listener.Accept()
		if err != nil {
			o.err = err
			return
		}
		defer conn.Close()
		defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
		buf := make([]byte, 1<<20)
		start := time.Now()
		last := start
		for {
			n, err := conn.Read(buf)
			now := time.Now()
			o.t.MaxStall, last = max(o.t.MaxStall, now.Sub(last)), now
			o.t.Bytes += int64(n)
			o.t.Time = now.Sub(start)
			o.sum = crc32.Update(o.sum, castagnoli, buf[:n])
			if err == io.EOF {
				break
			}
			if err != nil {
				o.err = err
				return
			}
		}
		var answer [4]byte
		binary.BigEndian.PutUint32(answer[:], o.sum)
		_, o.err = conn.Write(answer[:])
	}()

	sum, answer, err := send(ctx, dial, bytes, seed)
	if err != nil {
		cancel()
		_ = listener.Close() // for a receiver that nobody reached
	}
	got := <-received
	switch {
	case err != nil && ctx.Err() != nil:
		return got.t, fmt.Errorf("send stream: %w after %v", err, got.t)
	case err != nil:
		return got.t, fmt.Errorf("send stream: %w", err)
	case got.err != nil:
		return got.t, fmt.Errorf("receive stream: %w after %v", got.err, got.t)
	case got.t.Bytes != bytes || got.sum != sum || answer != sum:
		return got.t, fmt.Errorf("sent %d bytes with checksum %08x, received %d with %08x", bytes, sum, got.t.Bytes, got.sum)
	}
	return got.t, nil
}

func send(ctx context.Context, dial func() (net.Conn, error), bytes int64, seed uint64) (sum, answer uint32, err error) {
	conn, err := dial()
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	// A few different blocks, in an order that the seed gives: noise as good, at the speed of memory.
	random := rand.New(rand.NewPCG(seed, 0))
	blocks := make([][]byte, 8)
	for i := range blocks {
		blocks[i] = make([]byte, 256<<10)
		for j := 0; j < len(blocks[i]); j += 8 {
			binary.LittleEndian.PutUint64(blocks[i][j:], random.Uint64())
		}
	}
	for left := bytes; left > 0; {
		block := blocks[random.IntN(len(blocks))]
		block = block[:min(left, int64(len(block)))]
		sum = crc32.Update(sum, castagnoli, block)
		if _, err := conn.Write(block); err != nil {
			return sum, 0, err
		}
		left -= int64(len(block))
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return sum, 0, err
	}
	var b [4]byte
	_, err = io.ReadFull(conn, b[:])
	return sum, binary.BigEndian.Uint32(b[:]), err
}
