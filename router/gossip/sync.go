package gossip

import (
	"cmp"
	"encoding/binary"
	"slices"

	"meshd/mesh"
)

// Two peers compare a table in steps, each a message or a few, and neither remembers anything in between:
//
//	roots    A → B  a digest of every table; equal ones end here
//	buckets  B → A  of a table that differs: a digest of each of 256 parts, by the first byte of the key
//	items    A → B  the entries of the parts that differ, in ranges of keys
//	data     B → A  the entries that A lacks or has in another version
//	want     B → A  the keys that B lacks or has in another version
//	data     A → B  those
//
// Digests are short, so each exchange has a salt: what looks equal by accident differs the next time.
//
//	roots    1  salt 8  { channel 1  entries 4  digest 8 } ...
//	buckets  2  salt 8  channel 1  { digest 4 } × 256; 0 is an empty part
//	items    3  salt 8  channel 1  first key 8  last key 8  { key 8  digest 4 } ...
//	want     4  channel 1  { key 8 } ...
//	data     5  channel 1  delta
//
// First and last key bound what the message speaks of: what lies between and is not listed is not there.
const (
	syncRoots   = 1
	syncBuckets = 2
	syncItems   = 3
	syncWant    = 4
	syncData    = 5

	buckets       = 256
	syncHeader    = 1 + 1 + 8 // ChanSync, kind, salt
	itemsHeader   = syncHeader + 1 + 8 + 8
	itemSize      = 8 + 4
	itemsPerMsg   = (mesh.MaxMessage - itemsHeader) / itemSize
	keysPerMsg    = (mesh.MaxMessage - 3) / 8
	dataHeader    = 3
	entriesPerMsg = 64 // more of them than fit one message
	maxSyncReply  = 64 // messages in answer to one at most
	gapItems      = 8  // equal entries that are listed to save a message
)

// mix is the finalizer of a 64-bit hash: every bit of the result depends on every bit of v.
func mix(v uint64) uint64 {
	v = (v ^ v>>30) * 0xbf58476d1ce4e5b9
	v = (v ^ v>>27) * 0x94d049bb133111eb
	return v ^ v>>31
}

func digestOf(it mesh.Item, salt uint64) uint64 { return mix(it.Version ^ salt) }

// rootOf sums digests, so that the order of entries does not matter.
func rootOf(items []mesh.Item, salt uint64) (sum uint64) {
	for _, it := range items {
		sum += digestOf(it, salt)
	}
	return mix(sum)
}

func bucketsOf(items []mesh.Item, salt uint64) (out [buckets]uint32) {
	var sums [buckets]uint64
	var used [buckets]bool
	for _, it := range items {
		sums[it.Key>>56] += digestOf(it, salt)
		used[it.Key>>56] = true
	}
	for i := range out {
		if used[i] {
			out[i] = max(uint32(mix(sums[i])>>32), 1)
		}
	}
	return out
}

// byPart returns the entries part by part; part i lies between starts[i] and starts[i+1].
func byPart(items []mesh.Item) (out []mesh.Item, starts [buckets + 1]int) {
	for _, it := range items {
		starts[it.Key>>56+1]++
	}
	for i := range buckets {
		starts[i+1] += starts[i]
	}
	out, next := make([]mesh.Item, len(items)), starts
	for _, it := range items {
		out[next[it.Key>>56]] = it
		next[it.Key>>56]++
	}
	return out, starts
}

func syncMessage(kind byte, salt uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{byte(mesh.ChanSync), kind}, salt)
}

// rootsMessage begins an exchange about all tables.
func rootsMessage(tables map[mesh.Channel]Table, salt uint64) []byte {
	m := syncMessage(syncRoots, salt)
	for _, ch := range channels(tables) {
		items := tables[ch].Items()
		m = append(m, byte(ch))
		m = binary.BigEndian.AppendUint32(m, uint32(len(items)))
		m = binary.BigEndian.AppendUint64(m, rootOf(items, salt))
	}
	return m
}

func channels(tables map[mesh.Channel]Table) []mesh.Channel {
	out := make([]mesh.Channel, 0, len(tables))
	for ch := range tables {
		out = append(out, ch)
	}
	slices.Sort(out)
	return out
}

// syncOutcome is what a message of an exchange leads to.
type syncOutcome struct {
	replies [][]byte
	ch      mesh.Channel // of data
	data    []byte       // to be merged
	bad     bool         // malformed
}

// answerSync decides on one message, after its channel byte, and answers with most messages.
func answerSync(tables map[mesh.Channel]Table, b []byte, most int) (out syncOutcome) {
	if len(b) < 2 {
		return syncOutcome{bad: true}
	}
	kind, b := b[0], b[1:]
	switch kind {
	case syncWant, syncData:
		ch := mesh.Channel(b[0])
		table := tables[ch]
		if table == nil {
			return out // a room that we lack
		}
		if kind == syncData {
			return syncOutcome{ch: ch, data: b[1:]}
		}
		b = b[1:]
		if len(b)%8 != 0 || len(b) == 0 {
			return syncOutcome{bad: true}
		}
		var keys []uint64
		for ; len(b) > 0; b = b[8:] {
			keys = append(keys, binary.BigEndian.Uint64(b))
		}
		out.replies = dataMessages(ch, table, keys, most)
		return out
	}
	if len(b) < 8 {
		return syncOutcome{bad: true}
	}
	if most <= 0 {
		return out
	}
	salt, b := binary.BigEndian.Uint64(b), b[8:]
	switch kind {
	case syncRoots:
		out = answerRoots(tables, salt, b)
	case syncBuckets:
		out = answerBuckets(tables, salt, b, most)
	case syncItems:
		out = answerItems(tables, salt, b, most)
	} // or of a later version
	out.replies = out.replies[:min(len(out.replies), most)]
	return out
}

func answerRoots(tables map[mesh.Channel]Table, salt uint64, b []byte) (out syncOutcome) {
	const size = 1 + 4 + 8
	if len(b)%size != 0 || len(b)/size > 64 {
		return syncOutcome{bad: true}
	}
	for ; len(b) > 0; b = b[size:] {
		ch := mesh.Channel(b[0])
		table := tables[ch]
		if table == nil {
			continue
		}
		items := table.Items()
		if uint32(len(items)) == binary.BigEndian.Uint32(b[1:]) && rootOf(items, salt) == binary.BigEndian.Uint64(b[5:]) {
			continue
		}
		m := append(syncMessage(syncBuckets, salt), byte(ch))
		for _, d := range bucketsOf(items, salt) {
			m = binary.BigEndian.AppendUint32(m, d)
		}
		out.replies = append(out.replies, m)
	}
	return out
}

func answerBuckets(tables map[mesh.Channel]Table, salt uint64, b []byte, most int) (out syncOutcome) {
	if len(b) != 1+4*buckets {
		return syncOutcome{bad: true}
	}
	ch := mesh.Channel(b[0])
	table := tables[ch]
	if table == nil {
		return out
	}
	all := table.Items()
	ours := bucketsOf(all, salt)
	items, parts := byPart(all)
	theirs := func(i int) uint32 { return binary.BigEndian.Uint32(b[1+4*i:]) }
	// What there is no room for is left for the next time, so another part is the first each time.
	start := int(salt % buckets)
	var send []uint64 // keys of parts that the other lacks altogether
	for k := range buckets {
		if i := (start + k) % buckets; theirs(i) == 0 {
			for _, it := range items[parts[i]:parts[i+1]] {
				send = append(send, it.Key)
			}
		}
	}
	for i := 0; i < buckets; i++ {
		if theirs(i) == ours[i] || theirs(i) == 0 {
			continue
		}
		// Parts that differ share a message, with what lies between if that is little.
		last := i
		for k := i + 1; k < buckets && parts[k]-parts[last+1] <= gapItems && (theirs(k) != 0 || ours[k] == 0); k++ {
			if theirs(k) != ours[k] {
				last = k
			}
		}
		first, end := uint64(i)<<56, uint64(last)<<56|(1<<56-1)
		list := items[parts[i]:parts[last+1]]
		slices.SortFunc(list, func(x, y mesh.Item) int { return cmp.Compare(x.Key, y.Key) })
		out.replies = append(out.replies, itemsMessages(ch, salt, first, end, list)...)
		i = last
	}
	out.replies = append(out.replies, dataMessages(ch, table, send, most-len(out.replies))...)
	return out
}

// itemsMessages lists all entries from first to end, sorted by key.
func itemsMessages(ch mesh.Channel, salt, first, end uint64, items []mesh.Item) (out [][]byte) {
	for {
		n, last := len(items), end
		if n > itemsPerMsg {
			n = itemsPerMsg
			last = items[n-1].Key
		}
		m := append(syncMessage(syncItems, salt), byte(ch))
		m = binary.BigEndian.AppendUint64(m, first)
		m = binary.BigEndian.AppendUint64(m, last)
		for _, it := range items[:n] {
			m = binary.BigEndian.AppendUint64(m, it.Key)
			m = binary.BigEndian.AppendUint32(m, uint32(digestOf(it, salt)))
		}
		out = append(out, m)
		items = items[n:]
		if len(items) == 0 {
			return out
		}
		first = last + 1
	}
}

func answerItems(tables map[mesh.Channel]Table, salt uint64, b []byte, most int) (out syncOutcome) {
	const head = 1 + 8 + 8
	if len(b) < head || (len(b)-head)%itemSize != 0 {
		return syncOutcome{bad: true}
	}
	ch := mesh.Channel(b[0])
	table := tables[ch]
	if table == nil {
		return out
	}
	first, last := binary.BigEndian.Uint64(b[1:]), binary.BigEndian.Uint64(b[9:])
	theirs := make(map[uint64]uint32, (len(b)-head)/itemSize)
	for l := b[head:]; len(l) > 0; l = l[itemSize:] {
		theirs[binary.BigEndian.Uint64(l)] = binary.BigEndian.Uint32(l[8:])
	}
	var send, want []uint64
	for _, it := range table.Items() {
		if it.Key < first || it.Key > last {
			continue
		}
		digest, listed := theirs[it.Key]
		delete(theirs, it.Key)
		if listed && digest == uint32(digestOf(it, salt)) {
			continue
		}
		send = append(send, it.Key)
		if listed {
			want = append(want, it.Key)
		}
	}
	for key := range theirs {
		want = append(want, key)
	}
	if len(send) > entriesPerMsg {
		// Not everything may fit, and those who ask at the same time should not all get the same.
		at := int(salt % uint64(len(send)))
		send = slices.Concat(send[at:], send[:at])
	}
	for part := range slices.Chunk(want, keysPerMsg) {
		m := []byte{byte(mesh.ChanSync), syncWant, byte(ch)}
		for _, key := range part {
			m = binary.BigEndian.AppendUint64(m, key)
		}
		out.replies = append(out.replies, m)
	}
	out.replies = append(out.replies, dataMessages(ch, table, send, most-len(out.replies))...)
	return out
}

// dataMessages writes those entries, as far as most messages go.
func dataMessages(ch mesh.Channel, table Table, keys []uint64, most int) (out [][]byte) {
	if len(keys) == 0 || most <= 0 {
		return nil
	}
	// Not all entries are written just to be left out.
	keys = keys[:min(len(keys), most*entriesPerMsg)]
	for _, delta := range table.Encode(keys, mesh.MaxMessage-dataHeader) {
		if len(delta) > mesh.MaxMessage-dataHeader {
			continue // the table did not keep to the limit
		}
		out = append(out, append([]byte{byte(mesh.ChanSync), syncData, byte(ch)}, delta...))
		if len(out) == most {
			return out
		}
	}
	return out
}
