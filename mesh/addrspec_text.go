package mesh

// MarshalText writes the word that ParseAddrSpec reads, so that specs travel as JSON strings.
func (s AddrSpec) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads one word of the grammar.
func (s *AddrSpec) UnmarshalText(text []byte) error {
	v, err := ParseAddrSpec(string(text))
	if err == nil {
		*s = v
	}
	return err
}
