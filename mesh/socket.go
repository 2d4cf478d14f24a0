package mesh

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
)

// ClearSocket makes way for a unix socket: it removes one on which nobody listens any more, and only that. What is
// something else, or in use, is an error.
func ClearSocket(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return errors.New("what is there is not a socket; remove it")
	}
	// Only this refusal says that nobody is there: who is too busy to accept, or speaks datagrams, has others.
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("another process listens there: %w", syscall.EADDRINUSE)
	}
	return os.Remove(path)
}
