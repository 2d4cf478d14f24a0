package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
)

// bbolt walks a file's pages when it opens it, in a goroutine of its own where a damaged page ends the
// whole process. So the file is read here first, with every offset checked: the newest valid meta page,
// then every page that it leads to, each reached once, keys in order.
//
// The layout (bbolt's page.go and meta.go, file version 2; little endian, as on every platform we run on):
//
//	page   0 id (8) | 8 flags (2) | 10 count (2) | 12 overflow pages (4) | 16 elements or meta
//	meta   0 magic (4) | 4 version (4) | 8 page size (4) | 12 flags (4) | 16 root page (8) | 24 sequence (8)
//	       32 freelist page (8) | 40 pages in use (8) | 48 transaction (8) | 56 FNV-1a of the 56 before (8)
//	branch element   0 position of key, from the element (4) | 4 key size (4) | 8 page (8)
//	leaf element     0 flags (4) | 4 position of key (4) | 8 key size (4) | 12 value size (4); value follows key
//	bucket, as a leaf value   0 root page, 0 if inline (8) | 8 sequence (8) | 16 inline page
const (
	pageHead    = 16
	metaSize    = 64
	elementSize = 16
	bucketHead  = 16

	pageBranch = 0x01
	pageLeaf   = 0x02
	leafBucket = 0x01

	boltMagic   = 0xED0CDAED
	boltVersion = 2

	maxDepth = 64 // of pages below pages and buckets inside buckets: ours have a handful
)

type verifier struct {
	file     []byte
	pageSize uint64
	pages    uint64 // pages in use
	seen     map[uint64]bool
	item     func(bucket, key string, value []byte) error
}

// verify checks the bytes of a bbolt file and calls item for every key of every top-level bucket.
func verify(file []byte, item func(bucket, key string, value []byte) error) error {
	meta, err := newestMeta(file)
	if err != nil {
		return err
	}
	v := &verifier{file: file, item: item, seen: map[uint64]bool{0: true, 1: true},
		pageSize: uint64(binary.LittleEndian.Uint32(meta[8:])), pages: binary.LittleEndian.Uint64(meta[40:])}
	if v.pages > uint64(len(file))/v.pageSize {
		return fmt.Errorf("it was cut short: %d bytes are left of %d pages of %d", len(file), v.pages, v.pageSize)
	}
	return v.page(binary.LittleEndian.Uint64(meta[16:]), "", true, 0)
}

// newestMeta returns the meta of the last finished transaction. bbolt does the same, so that a crash
// while one of the two is being written does no harm.
func newestMeta(file []byte) (best []byte, err error) {
	// The second meta page is one page in; the first one, or else its own content, says how long that is.
	for size := 1024; size <= 64<<10; size <<= 1 {
		for at := range 2 {
			off := at*size + pageHead
			if off+metaSize > len(file) {
				continue
			}
			m := file[off : off+metaSize]
			if !validMeta(m) || binary.LittleEndian.Uint32(m[8:]) != uint32(size) {
				continue
			}
			if best == nil || binary.LittleEndian.Uint64(m[48:]) > binary.LittleEndian.Uint64(best[48:]) {
				best = m
			}
		}
	}
	if best == nil {
		return nil, errors.New("neither of its two roots is valid")
	}
	return best, nil
}

func validMeta(m []byte) bool {
	h := fnv.New64a()
	h.Write(m[:56])
	return binary.LittleEndian.Uint32(m) == boltMagic && binary.LittleEndian.Uint32(m[4:]) == boltVersion &&
		binary.LittleEndian.Uint64(m[56:]) == h.Sum64()
}

// page checks the page with this id and all below it; root says that its keys are buckets' names.
func (v *verifier) page(id uint64, bucket string, root bool, depth int) error {
	if id >= v.pages || id < 2 || depth > maxDepth {
		return fmt.Errorf("page %d is not one of %d", id, v.pages)
	}
	if v.seen[id] {
		return fmt.Errorf("page %d is used twice", id)
	}
	head := v.file[id*v.pageSize:]
	if binary.LittleEndian.Uint64(head) != id {
		return fmt.Errorf("page %d bears another number", id)
	}
	span := 1 + uint64(binary.LittleEndian.Uint32(head[12:]))
	if span > v.pages-id {
		return fmt.Errorf("page %d runs over the end", id)
	}
	for i := range span {
		if v.seen[id+i] {
			return fmt.Errorf("page %d is used twice", id+i)
		}
		v.seen[id+i] = true
	}
	if err := v.elements(head[:span*v.pageSize], bucket, root, depth); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

func (v *verifier) elements(p []byte, bucket string, root bool, depth int) error {
	flags, count := binary.LittleEndian.Uint16(p[8:]), int(binary.LittleEndian.Uint16(p[10:]))
	if flags != pageBranch && flags != pageLeaf || pageHead+count*elementSize > len(p) {
		return errors.New("its header is damaged")
	}
	if flags == pageBranch && count == 0 {
		return errors.New("an empty branch")
	}
	var last []byte
	for i := range count {
		e := p[pageHead+i*elementSize:]
		var pos, ksize, vsize uint64
		if flags == pageBranch {
			pos, ksize = uint64(binary.LittleEndian.Uint32(e)), uint64(binary.LittleEndian.Uint32(e[4:]))
		} else {
			pos, ksize, vsize = uint64(binary.LittleEndian.Uint32(e[4:])), uint64(binary.LittleEndian.Uint32(e[8:])), uint64(binary.LittleEndian.Uint32(e[12:]))
		}
		if pos+ksize+vsize > uint64(len(e)) {
			return errors.New("a key or value lies outside")
		}
		key, value := e[pos:pos+ksize], e[pos+ksize:pos+ksize+vsize]
		if i > 0 && bytes.Compare(last, key) >= 0 {
			return errors.New("keys are out of order")
		}
		last = key
		var err error
		switch {
		case flags == pageBranch:
			err = v.page(binary.LittleEndian.Uint64(e[8:]), bucket, root, depth+1)
		case root:
			err = v.bucket(binary.LittleEndian.Uint32(e), string(key), value, depth)
		case binary.LittleEndian.Uint32(e) != 0:
			err = errors.New("a bucket inside a bucket")
		default:
			err = v.item(bucket, string(key), value)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (v *verifier) bucket(flags uint32, name string, value []byte, depth int) error {
	if flags != leafBucket || len(value) < bucketHead {
		return errors.New("a value where a bucket should be")
	}
	if id := binary.LittleEndian.Uint64(value); id != 0 {
		return v.page(id, name, false, depth+1)
	}
	if len(value) < bucketHead+pageHead {
		return errors.New("an inline bucket is cut short")
	}
	inline := value[bucketHead:]
	if binary.LittleEndian.Uint16(inline[8:]) != pageLeaf {
		return errors.New("an inline bucket that is no leaf")
	}
	return v.elements(inline, name, false, depth+1)
}
