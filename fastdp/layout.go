package fastdp

// LayoutVersion is the version of the maps' layout (bpf/maps.h), part of the path of their pins. A meshd
// with another one makes its own maps beside those that it finds, fills them from there field by field
// (migrate_linux.go) and then moves every hook over. To be raised by one with every change that
// TestLayout reports.
const LayoutVersion = 3
