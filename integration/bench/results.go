package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

// result is what one run measured, and what all runs of a kind did together.
type result struct {
	Whole    bool // superframes crossed the underlay whole
	Length   time.Duration
	Networks []figures
	Missing  []string // what could not be measured, and why
}

// figures of one network, in order of the rounds.
type figures struct {
	Name   string
	Values map[string][]float64
}

// results are all that is known, for both kinds of underlay.
type results []*result

func newResult(o options) *result { return &result{Whole: o.whole, Length: o.length} }

// readResults reads a file that save wrote; one that is not there holds nothing.
func readResults(file string) (r results, err error) {
	if file == "" {
		return nil, nil
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

func (r results) save(file string) error {
	if file == "" {
		return nil
	}
	data, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o644)
}

// add puts the rounds of one more run behind those that are there.
func (r *results) add(x *result) {
	for _, old := range *r {
		if old.Whole != x.Whole {
			continue
		}
		for _, n := range x.Networks {
			if have := old.network(n.Name); have == nil {
				old.Networks = append(old.Networks, n)
			} else {
				for what, v := range n.Values {
					have.Values[what] = append(have.Values[what], v...)
				}
			}
		}
		old.Missing = x.Missing
		return
	}
	*r = append(*r, x)
}

func (r *result) network(name string) *figures {
	for i := range r.Networks {
		if r.Networks[i].Name == name {
			return &r.Networks[i]
		}
	}
	return nil
}
