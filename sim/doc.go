// Package sim simulates whole meshes: its tests run the real membership, topology, address ring, names and
// forwarding decisions of many peers in one testing/synctest bubble, on an underlay in memory that delays,
// loses, doubles, reorders, cuts and starves (router/gossip/simnet), with disks that fail and processes
// that die at any write. There is nothing here for the product.
//
// A history is drawn from a seed: go test ./sim -run TestHistories -seed 7. The history is then always the
// same, and so are the random choices of the peers; the order in which goroutines run at the same moment is
// the scheduler's. What fails is shortened to the events that it needs and printed as one line, which goes
// into testdata/histories to be kept.
package sim
