// Package control is how a running meshd is steered and looked at: an HTTP API on a unix socket that
// only root may open (Server), the typed client that meshctl uses (Client), the Report that every
// status text and metric is made from, and the pid file.
//
// The server knows the rooms only as the small interfaces in backend.go, each of which may be nil when
// its feature is off. A second, read-only face serves status, report and metrics.
//
// Invariant: nothing here changes the mesh by a GET, and the read-only face has nothing but GETs.
package control
