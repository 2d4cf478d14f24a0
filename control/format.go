package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/template"
)

// maxFormatted bounds the output of a template, in bytes.
const maxFormatted = 16 << 20

// Format executes a Go template on the report. It has the function json beside the usual ones.
func (r *Report) Format(text string) (string, error) {
	t, err := template.New("report").Funcs(template.FuncMap{"json": jsonText}).Parse(text)
	if err != nil {
		return "", err
	}
	var out boundedBuilder
	if err := t.Execute(&out, r); err != nil {
		return "", err
	}
	return out.String(), nil
}

func jsonText(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}

type boundedBuilder struct{ strings.Builder }

var errTooLong = errors.New("the output is too long")

func (b *boundedBuilder) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxFormatted {
		return 0, fmt.Errorf("%w: over %d bytes", errTooLong, maxFormatted)
	}
	return b.Builder.Write(p)
}
