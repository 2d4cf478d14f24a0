package fastdp

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// Maps of another layout are read by what their own BTF says of them: a field that has the same name and
// size there and here is copied, a field that is new here starts as zero. So a layout may gain, lose,
// move and widen fields, add maps, and nothing needs to know the layouts of the past. What must not change
// are the names of the maps and of their structures, and what a field of a given name and size means.
var carriedOver = []struct{ name, key, value string }{ // structures by name; "" is a number
	{bpfMapConfig, "", "config"},
	{bpfMapPeers, "", "peer"},
	{bpfMapUnderlays, "underlay_key", ""},
	{bpfMapEndpoints, "", "endpoint"},
	{bpfMapPorts, "", "port"},
	{bpfMapNetworks, "", "network"},
}

// migrate fills the maps of o from the newest other layout below pinDir, if there is one.
func (o *objects) migrate(pinDir string, version int) (found bool, err error) {
	versions, err := layouts(pinDir)
	if err != nil {
		return false, err
	}
	from := -1
	for _, v := range versions {
		if v != version && v > from {
			from = v
		}
	}
	if from < 0 {
		return false, nil
	}
	for _, c := range carriedOver {
		old, err := ebpf.LoadPinnedMap(filepath.Join(layoutDir(pinDir, from), c.name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("map %s of layout %d: %w", c.name, from, err)
		}
		err = copyMap(old, o.maps()[c.name], c.key, c.value)
		old.Close()
		if err != nil {
			return false, fmt.Errorf("map %s of layout %d: %w", c.name, from, err)
		}
	}
	return true, nil
}

// copyMap copies every element. Zero values of arrays are skipped: new ones are zero already.
func copyMap(from, to *ebpf.Map, keyType, valueType string) error {
	key, err := fieldMoves(from, to, keyType, from.KeySize(), to.KeySize())
	if err != nil {
		return err
	}
	value, err := fieldMoves(from, to, valueType, from.ValueSize(), to.ValueSize())
	if err != nil {
		return err
	}
	var k, v []byte
	for it := from.Iterate(); ; {
		if !it.Next(&k, &v) {
			return it.Err()
		}
		newKey, newValue := key.apply(k), value.apply(v)
		if from.Type() == ebpf.Array && allZero(newValue) {
			continue
		}
		if err := to.Put(newKey, newValue); err != nil {
			return err
		}
	}
}

func allZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}

// moves says which bytes of an old value go where in a new one.
type moves struct {
	size  uint32
	parts []struct{ from, to, size uint32 }
}

func (m moves) apply(old []byte) []byte {
	b := make([]byte, m.size)
	for _, p := range m.parts {
		if int(p.from+p.size) <= len(old) && int(p.to+p.size) <= len(b) {
			copy(b[p.to:], old[p.from:p.from+p.size])
		}
	}
	return b
}

func (m *moves) add(from, to, size uint32) {
	m.parts = append(m.parts, struct{ from, to, size uint32 }{from, to, size})
}

func fieldMoves(from, to *ebpf.Map, typeName string, fromSize, toSize uint32) (moves, error) {
	m := moves{size: toSize}
	if typeName == "" {
		if fromSize != toSize {
			return m, fmt.Errorf("size %d, want %d", fromSize, toSize)
		}
		m.add(0, 0, toSize)
		return m, nil
	}
	oldStruct, err := mapStruct(from, typeName)
	if err != nil {
		return m, err
	}
	newStruct, err := mapStruct(to, typeName)
	if err != nil {
		return m, err
	}
	for _, n := range newStruct.Members {
		for _, old := range oldStruct.Members {
			if old.Name != n.Name {
				continue
			}
			oldSize, err := btf.Sizeof(old.Type)
			if err != nil {
				return m, err
			}
			newSize, err := btf.Sizeof(n.Type)
			if err != nil {
				return m, err
			}
			if oldSize == newSize {
				m.add(old.Offset.Bytes(), n.Offset.Bytes(), uint32(newSize))
			}
		}
	}
	return m, nil
}

func mapStruct(m *ebpf.Map, name string) (*btf.Struct, error) {
	info, err := m.Info()
	if err != nil {
		return nil, err
	}
	id, ok := info.BTFID()
	if !ok {
		return nil, fmt.Errorf("no description of struct %s", name)
	}
	h, err := btf.NewHandleFromID(id)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	spec, err := h.Spec(nil)
	if err != nil {
		return nil, err
	}
	var s *btf.Struct
	if err := spec.TypeByName(name, &s); err != nil {
		return nil, err
	}
	return s, nil
}
