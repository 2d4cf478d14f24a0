package sim

import (
	"errors"
	"maps"
	"slices"
	"sync"
)

// disk is the state file of one host, which outlives its processes.
type disk struct {
	mu   sync.Mutex // guards all below, and the mounts
	data map[string]map[string][]byte
	full bool // writes fail, every other one after it has been done
	odd  int
}

// mount is the disk as one process has it. It can be told to have the process die at a write.
type mount struct {
	disk *disk
	die  func() // takes the process away; called without the lock

	dead   bool
	fuse   int  // the process dies at so many writes from now; 0: does not
	undone bool // before that write is done, not after
}

var (
	errFull = errors.New("simulated: no space left on device")
	errDead = errors.New("simulated: the process is dead")
)

// All reads a bucket.
func (m *mount) All(bucket string) (map[string][]byte, error) {
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	if m.dead {
		return nil, errDead
	}
	return maps.Clone(m.disk.data[bucket]), nil
}

// Put writes one bucket.
func (m *mount) Put(bucket string, kv map[string][]byte) error {
	return m.PutAll(map[string]map[string][]byte{bucket: kv})
}

// PutAll writes several buckets, all or nothing.
func (m *mount) PutAll(buckets map[string]map[string][]byte) error {
	err, died := m.write(buckets)
	if died {
		m.die()
	}
	return err
}

func (m *mount) write(buckets map[string]map[string][]byte) (err error, died bool) {
	d := m.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.dead {
		return errDead, false
	}
	if m.fuse > 0 {
		if m.fuse--; m.fuse == 0 {
			m.dead = true
			if m.undone {
				return errDead, true
			}
		}
	}
	if d.full {
		if d.odd++; d.odd%2 == 0 {
			return errFull, m.dead
		}
	}
	for bucket, kv := range buckets {
		if d.data[bucket] == nil {
			d.data[bucket] = map[string][]byte{}
		}
		for k, v := range kv {
			if v == nil {
				delete(d.data[bucket], k)
			} else {
				d.data[bucket][k] = slices.Clone(v)
			}
		}
	}
	switch {
	case m.dead:
		return errDead, true
	case d.full:
		return errFull, false // it is there all the same
	}
	return nil, false
}

// light has the process die at a write to come.
func (m *mount) light(fuse int, undone bool) {
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	m.fuse, m.undone = fuse, undone
}

// unmount ends what the process can do.
func (m *mount) unmount() {
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	m.dead = true
}

func (m *mount) gone() bool {
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	return m.dead
}

func (d *disk) fill(full bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = full
}
