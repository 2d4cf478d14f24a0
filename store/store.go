// Package store keeps meshd's state in one bbolt file: named buckets of keys and values, each Put one
// synced transaction. It is the only home of bbolt.
//
// What it promises: a Put that returned nil survives kill -9 and power loss; a Put that failed may or
// may not have reached the disk, so the caller writes what should be true again; a file that cannot be
// understood is left exactly as it is and reported, never replaced by an empty one.
package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	boltErrors "go.etcd.io/bbolt/errors"
)

// Errors that callers branch on; each comes wrapped with the path.
var (
	ErrLocked  = errors.New("another meshd has the state file open")
	ErrNewer   = errors.New("the state file was written by a newer meshd")
	ErrCorrupt = errors.New("the state file is damaged")
	ErrClosed  = errors.New("the state file is closed")
)

// Schema is the version of the layout that this program writes. A file with a lower one is read and
// raised at the first Put; a higher one is refused before anything is written.
const Schema = 1

// lockWait is how long Open waits for another process to let go of the file.
const lockWait = time.Second

const (
	metaBucket = "\x00store" // no caller's bucket starts with a zero byte
	schemaKey  = "schema"
	sumSize    = 4 // CRC-32C of bucket, key and value, after every value
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Store is an open state file. Its methods may be called from any goroutine.
type Store struct {
	path string

	mu sync.RWMutex // guards db against Close
	db *bolt.DB     // nil once closed
}

// Open opens the state file, making it (mode 0600) and its directory (0700) if there is none. It takes
// at most about a second to say ErrLocked.
func Open(path string) (*Store, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open state file: %w", err)
	}
	_, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = create(path)
	}
	if err != nil {
		return nil, fmt.Errorf("open state file: %w", err)
	}
	if err := inspect(path); err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	db, err := openBolt(path, false)
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("open state file: %w", err), db.Close())
	}
	return &Store{path: path, db: db}, nil
}

// create makes an empty state file beside path and links it into place once it is whole and synced, so
// that a crash half way leaves no file that looks damaged, and of two daemons one wins.
func create(path string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-state-*")
	if err != nil {
		return err
	}
	tmp := f.Name()
	defer func() { err = errors.Join(err, os.Remove(tmp)) }()
	if err := f.Close(); err != nil {
		return err
	}
	db, err := openBolt(tmp, false)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucket([]byte(metaBucket))
		if err != nil {
			return err
		}
		return b.Put([]byte(schemaKey), binary.BigEndian.AppendUint32(nil, Schema))
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := os.Link(tmp, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// inspect reads the file without writing to it: whole, ours, of a schema that we know.
func inspect(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	if info.Size() == 0 {
		return fmt.Errorf("%w: it is empty", ErrCorrupt)
	}
	db, err := openBolt(path, true) // for its shared lock: nobody writes while we read
	if err != nil {
		return err
	}
	defer db.Close()
	file, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	schema := uint32(0)
	err = verify(file, func(bucket, key string, stored []byte) error {
		if bucket == metaBucket {
			if key == schemaKey && len(stored) == 4 {
				schema = binary.BigEndian.Uint32(stored)
			}
			return nil
		}
		if schema > Schema {
			return nil // another layout: only its version matters
		}
		_, err := unseal(bucket, key, stored)
		return err
	})
	switch {
	case schema > Schema:
		return fmt.Errorf("%w: schema %d, this one knows up to %d", ErrNewer, schema, Schema)
	case errors.Is(err, ErrCorrupt):
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	case schema == 0:
		return fmt.Errorf("%w: it is not a meshd state file", ErrCorrupt)
	}
	return nil
}

func openBolt(path string, readOnly bool) (db *bolt.DB, err error) {
	err = guard(func() error {
		db, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:  lockWait,
			ReadOnly: readOnly,
			// The list of free pages is found again by a scan at start; not writing it saves pages per Put.
			NoFreelistSync: true,
			FreelistType:   bolt.FreelistMapType,
			NoStatistics:   true,
		})
		return err
	})
	switch {
	case errors.Is(err, boltErrors.ErrTimeout):
		return nil, ErrLocked
	case errors.Is(err, boltErrors.ErrInvalid), errors.Is(err, boltErrors.ErrChecksum), errors.Is(err, boltErrors.ErrVersionMismatch):
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	case err != nil:
		return nil, err
	}
	return db, nil
}

// guard turns bbolt's panics, which a damaged page or a failing disk under its memory map can cause,
// into errors. It covers the calling goroutine only.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrCorrupt, r)
		}
	}()
	return f()
}

// Path returns the file's path.
func (s *Store) Path() string { return s.path }

// Get returns a copy of the value, or nil if there is none.
func (s *Store) Get(bucket, key string) (value []byte, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		if b := tx.Bucket([]byte(bucket)); b != nil {
			if v := b.Get([]byte(key)); v != nil {
				value, err = unseal(bucket, key, v)
				return err
			}
		}
		return nil
	})
	return value, err
}

// All returns copies of all keys and values of a bucket; an absent bucket is an empty map.
func (s *Store) All(bucket string) (map[string][]byte, error) {
	out := make(map[string][]byte)
	err := s.view(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte(bucket))
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			value, err := unseal(bucket, string(k), v)
			out[string(k)] = value
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Put writes all the keys of one bucket in one synced transaction; a nil value deletes its key.
func (s *Store) Put(bucket string, kv map[string][]byte) error {
	return s.PutAll(map[string]map[string][]byte{bucket: kv})
}

// PutAll is Put over several buckets, still one synced transaction.
func (s *Store) PutAll(buckets map[string]map[string][]byte) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.db == nil {
		return fmt.Errorf("state file %s: %w", s.path, ErrClosed)
	}
	err := guard(func() error {
		return s.db.Update(func(tx *bolt.Tx) error {
			for name, kv := range buckets {
				b, err := tx.CreateBucketIfNotExists([]byte(name))
				if err != nil {
					return err
				}
				if err := putBucket(b, name, kv); err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("write state file %s: %w", s.path, err)
	}
	return nil
}

func putBucket(b *bolt.Bucket, name string, kv map[string][]byte) error {
	for k, v := range kv {
		var err error
		if v == nil {
			err = b.Delete([]byte(k))
		} else {
			err = b.Put([]byte(k), seal(name, k, v))
		}
		if err != nil {
			return fmt.Errorf("%s/%s: %w", name, k, err)
		}
	}
	return nil
}

// Close lets go of the file; it may be called twice.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.db == nil {
		return nil
	}
	err := s.db.Close()
	s.db = nil
	return err
}

func (s *Store) view(f func(*bolt.Tx) error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.db == nil {
		return fmt.Errorf("state file %s: %w", s.path, ErrClosed)
	}
	if err := guard(func() error { return s.db.View(f) }); err != nil {
		return fmt.Errorf("read state file %s: %w", s.path, err)
	}
	return nil
}

func checksum(bucket, key string, value []byte) uint32 {
	sum := crc32.Update(0, castagnoli, []byte(bucket))
	sum = crc32.Update(sum, castagnoli, []byte{0})
	sum = crc32.Update(sum, castagnoli, []byte(key))
	sum = crc32.Update(sum, castagnoli, []byte{0})
	return crc32.Update(sum, castagnoli, value)
}

func seal(bucket, key string, value []byte) []byte {
	out := make([]byte, 0, len(value)+sumSize)
	return binary.BigEndian.AppendUint32(append(out, value...), checksum(bucket, key, value))
}

func unseal(bucket, key string, stored []byte) ([]byte, error) {
	n := len(stored) - sumSize
	if n < 0 || binary.BigEndian.Uint32(stored[n:]) != checksum(bucket, key, stored[:n]) {
		return nil, fmt.Errorf("%w: %s/%q does not match its checksum", ErrCorrupt, bucket, key)
	}
	return append([]byte{}, stored[:n]...), nil
}
