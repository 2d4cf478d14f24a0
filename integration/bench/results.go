package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"
)

// result is what one run measured, and what all runs of a kind did together.
type result struct {
	Underlay string
	Length   time.Duration
	Networks []figures
	Missing  []string // what could not be measured, and why
}

// figures of one network, in order of the rounds, and what they are of the reference's in the same round.
type figures struct {
	Name           string
	Values, Ratios map[string][]float64
}

// Kinds of underlay, and what the page calls them.
const (
	wire     = "wire"
	bareWire = "bare wire"
	whole    = "whole"
)

var underlays = map[string]string{
	wire:     "Packets of MTU size on the underlay, joined by whoever receives them (GRO), as with network cards",
	bareWire: "Packets of MTU size on the underlay, received one by one",
	whole:    "Superframes cross the underlay whole, as between namespaces",
}

// results are all that is known, for every kind of underlay.
type results []*result

func newResult(o options) *result { return &result{Underlay: o.underlay, Length: o.length} }

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
		if old.Underlay != x.Underlay {
			continue
		}
		for _, n := range x.Networks {
			if have := old.network(n.Name); have == nil {
				old.Networks = append(old.Networks, n)
			} else {
				for what, v := range n.Values {
					have.Values[what] = append(have.Values[what], v...)
					have.Ratios[what] = append(have.Ratios[what], n.Ratios[what]...)
				}
			}
		}
		for _, m := range x.Missing {
			if !slices.Contains(old.Missing, m) {
				old.Missing = append(old.Missing, m)
			}
		}
		return
	}
	*r = append(*r, x)
}

// compare works out the ratios.
func (r *result) compare() {
	ref := r.network(reference)
	for i := range r.Networks {
		n := &r.Networks[i]
		n.Ratios = map[string][]float64{}
		for _, what := range compared {
			if ref != nil {
				n.Ratios[what] = ratios(n.Values[what], ref.Values[what])
			}
		}
	}
}

func (r *result) network(name string) *figures {
	for i := range r.Networks {
		if r.Networks[i].Name == name {
			return &r.Networks[i]
		}
	}
	return nil
}
