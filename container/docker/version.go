package docker

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// Version is one of the API, such as 1.41.
type Version struct{ Major, Minor int }

func (v Version) String() string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// Less orders versions.
func (v Version) Less(w Version) bool {
	return v.Major < w.Major || v.Major == w.Major && v.Minor < w.Minor
}

// ParseVersion reads "1.41".
func ParseVersion(s string) (Version, error) {
	major, minor, ok := strings.Cut(s, ".")
	a, err := strconv.ParseUint(major, 10, 16)
	if err == nil && ok {
		var b uint64
		if b, err = strconv.ParseUint(minor, 10, 16); err == nil {
			return Version{int(a), int(b)}, nil
		}
	}
	if len(s) > 32 {
		s = s[:32]
	}
	return Version{}, fmt.Errorf("%q is no API version such as 1.41", s)
}

// APIVersion is the version that client and daemon agree upon.
func (c *Client) APIVersion(ctx context.Context) (Version, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return c.negotiate(ctx)
}

func (c *Client) negotiate(ctx context.Context) (Version, error) {
	c.mu.Lock()
	v := c.version
	c.mu.Unlock()
	if v != (Version{}) {
		return v, nil
	}
	resp, err := c.do(ctx, http.MethodGet, "/version") // without a version: every daemon answers it
	if err != nil {
		return Version{}, err
	}
	defer resp.Body.Close()
	if err := statusError(resp); err != nil {
		return Version{}, fmt.Errorf("ask for the API version: %w", err)
	}
	var says struct{ APIVersion, MinAPIVersion string } // Docker spells ApiVersion; JSON does not mind
	if err := decode(resp.Body, &says); err != nil {
		return Version{}, fmt.Errorf("ask for the API version: %w", err)
	}
	if v, err = agree(says.APIVersion, says.MinAPIVersion); err != nil {
		return Version{}, err
	}
	c.mu.Lock()
	c.version = v
	c.mu.Unlock()
	return v, nil
}

// forget makes the next call ask for the version again.
func (c *Client) forget() {
	c.mu.Lock()
	c.version = Version{}
	c.mu.Unlock()
}

// agree chooses the lower of the newest versions on both sides, if it is not too old for either.
func agree(theirs, theirOldest string) (Version, error) {
	v, err := ParseVersion(theirs)
	if err != nil {
		return v, fmt.Errorf("%w: %w", ErrVersion, err)
	}
	if v.Less(oldest) {
		return v, fmt.Errorf("%w: it speaks at most %v, we at least %v", ErrVersion, v, oldest)
	}
	if newest.Less(v) {
		v = newest
	}
	if theirOldest != "" {
		low, err := ParseVersion(theirOldest)
		if err != nil {
			return v, fmt.Errorf("%w: %w", ErrVersion, err)
		}
		if v.Less(low) {
			return v, fmt.Errorf("%w: it speaks at least %v, we at most %v", ErrVersion, low, newest)
		}
	}
	return v, nil
}
