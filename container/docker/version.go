package docker

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// version is one of the API, such as 1.41.
type version struct{ major, minor int }

func (v version) String() string { return fmt.Sprintf("%d.%d", v.major, v.minor) }

func (v version) less(w version) bool {
	return v.major < w.major || v.major == w.major && v.minor < w.minor
}

// parseVersion reads "1.41".
func parseVersion(s string) (version, error) {
	major, minor, ok := strings.Cut(s, ".")
	a, err := strconv.ParseUint(major, 10, 16)
	if err == nil && ok {
		var b uint64
		if b, err = strconv.ParseUint(minor, 10, 16); err == nil {
			return version{int(a), int(b)}, nil
		}
	}
	if len(s) > 32 {
		s = s[:32]
	}
	return version{}, fmt.Errorf("%q is no API version such as 1.41", s)
}

// negotiate finds out the version that client and daemon agree upon.
func (c *Client) negotiate(ctx context.Context) (version, error) {
	c.mu.Lock()
	v := c.version
	c.mu.Unlock()
	if v != (version{}) {
		return v, nil
	}
	resp, err := c.do(ctx, "/version") // without a version: every daemon answers it
	if err != nil {
		return version{}, err
	}
	defer resp.Body.Close()
	if err := statusError(resp); err != nil {
		return version{}, fmt.Errorf("ask for the API version: %w", err)
	}
	var says struct{ APIVersion, MinAPIVersion string } // Docker spells ApiVersion; JSON does not mind
	if err := decode(resp.Body, &says); err != nil {
		return version{}, fmt.Errorf("ask for the API version: %w", err)
	}
	if v, err = agree(says.APIVersion, says.MinAPIVersion); err != nil {
		return version{}, err
	}
	c.mu.Lock()
	c.version = v
	c.mu.Unlock()
	return v, nil
}

// forget makes the next call ask for the version again.
func (c *Client) forget() {
	c.mu.Lock()
	c.version = version{}
	c.mu.Unlock()
}

// agree chooses the lower of the newest versions on both sides, if it is not too old for either.
func agree(theirs, theirOldest string) (version, error) {
	v, err := parseVersion(theirs)
	if err != nil {
		return v, fmt.Errorf("%w: %w", ErrVersion, err)
	}
	if v.less(oldest) {
		return v, fmt.Errorf("%w: it speaks at most %v, we at least %v", ErrVersion, v, oldest)
	}
	if newest.less(v) {
		v = newest
	}
	if theirOldest != "" {
		low, err := parseVersion(theirOldest)
		if err != nil {
			return v, fmt.Errorf("%w: %w", ErrVersion, err)
		}
		if v.less(low) {
			return v, fmt.Errorf("%w: it speaks at least %v, we at most %v", ErrVersion, low, newest)
		}
	}
	return v, nil
}
