package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// setting is one "name = value" line of the configuration file.
type setting struct {
	line        int
	name, value string
}

// maxSettings bounds the file: there are fewer options, and only a few of them repeat.
const maxSettings = 1000

// readSettings reads lines of "name = value", where names are those of the flags. Empty lines and
// lines that start with # are skipped. A value may stand in double quotes, which are dropped.
func readSettings(r io.Reader) ([]setting, error) {
	var out []setting
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" || text[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(text, "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		if !ok || name == "" || strings.ContainsAny(name, " \t\"") {
			return nil, fmt.Errorf("line %d: want name = value", n)
		}
		if strings.HasPrefix(value, `"`) {
			if len(value) < 2 || !strings.HasSuffix(value, `"`) || strings.Contains(value[1:len(value)-1], `"`) {
				return nil, fmt.Errorf("line %d: the quotes do not match", n)
			}
			value = value[1 : len(value)-1]
		}
		if len(out) == maxSettings {
			return nil, fmt.Errorf("line %d: more than %d settings", n, maxSettings)
		}
		out = append(out, setting{n, name, value})
	}
	return out, lines.Err()
}
