package tunnel

import "encoding/binary"

// vnetLen is the size of struct virtio_net_hdr (linux/virtio_net.h) before every frame of a Port, in the
// byte order of the host:
//
//	0        1          2           4           6             8              10
//	+--------+----------+-----------+-----------+-------------+--------------+
//	| flags  | gso_type | hdr_len   | gso_size  | csum_start  | csum_offset  |
//	+--------+----------+-----------+-----------+-------------+--------------+
const vnetLen = 10

const (
	vnetNeedsCsum = 1 // flags: VIRTIO_NET_HDR_F_NEEDS_CSUM

	gsoNone  = 0
	gsoTCPv4 = 1
	gsoTCPv6 = 4
	gsoUDP   = 5    // VIRTIO_NET_HDR_GSO_UDP_L4, Linux 6.2
	gsoECN   = 0x80 // beside another: CWR is set in the first segment only
)

type vnetHeader struct {
	flags, gso                                byte
	headerLen, gsoSize, csumStart, csumOffset uint16
}

func parseVnet(b []byte) vnetHeader {
	e := binary.NativeEndian
	return vnetHeader{b[0], b[1], e.Uint16(b[2:]), e.Uint16(b[4:]), e.Uint16(b[6:]), e.Uint16(b[8:])}
}

func putVnet(b []byte, h vnetHeader) {
	e := binary.NativeEndian
	b[0], b[1] = h.flags, h.gso
	e.PutUint16(b[2:], h.headerLen)
	e.PutUint16(b[4:], h.gsoSize)
	e.PutUint16(b[6:], h.csumStart)
	e.PutUint16(b[8:], h.csumOffset)
}
