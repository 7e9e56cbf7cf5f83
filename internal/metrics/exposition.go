package metrics

import (
	"bytes"
	"fmt"
	"io"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
)

// Exposition writes what a collector says, and what the process itself takes.
type Exposition struct{ registry *prometheus.Registry }

// NewExposition is of one agent.
func NewExposition(c *Collector) (*Exposition, error) {
	registry := prometheus.NewRegistry()
	for _, part := range []prometheus.Collector{c, collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := registry.Register(part); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return &Exposition{registry}, nil
}

// Render makes a whole answer, in the form that a request with these headers wants. It
// ends before the first byte is sent: a slow reader holds nothing but its answer.
func (x *Exposition) Render(request http.Header) (body []byte, contentType string, err error) {
	families, err := x.registry.Gather()
	if err != nil {
		return nil, "", fmt.Errorf("metrics: %w", err)
	}
	format := expfmt.NegotiateAccept(request, expfmt.FmtText, expfmt.FmtProtoDelim) // who takes anything is a person
	var buf bytes.Buffer
	encoder := expfmt.NewEncoder(&buf, format)
	for _, f := range families {
		if err := encoder.Encode(f); err != nil {
			return nil, "", fmt.Errorf("metrics: %s: %w", f.GetName(), err)
		}
	}
	if c, ok := encoder.(io.Closer); ok {
		if err := c.Close(); err != nil {
			return nil, "", fmt.Errorf("metrics: %w", err)
		}
	}
	return buf.Bytes(), string(format), nil
}
