//go:build !amd64 && !arm64

package wait

var program []byte
