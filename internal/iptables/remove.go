package iptables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// Remove removes everything of ours, in both backends and families, and says what it
// removed, a line each. Doing it again is harmless.
func Remove(ctx context.Context, o Options) (removed []string, err error) {
	var errs []error
	for _, p := range o.installed(ctx) {
		gone, err := p.remove(ctx)
		removed = append(removed, gone...)
		if err != nil {
			errs = append(errs, familyError(p.family, err))
		}
	}
	if setsSupported() {
		for _, f := range families {
			gone, err := discard(f, nil)
			for _, name := range gone {
				removed = append(removed, "set "+name)
			}
			errs = append(errs, err)
		}
	}
	return removed, errors.Join(errs...)
}

// remove takes our jumps and chains out of the tables that exist. A backend or family
// that the kernel lacks has none.
func (p program) remove(ctx context.Context) (removed []string, err error) {
	now, err := p.readAll(ctx)
	if errors.Is(err, errHidden) || errors.Is(err, errHangs) || ctx.Err() != nil {
		return nil, err // it may hold rules of ours
	} else if err != nil {
		p.opts.note("iptables: backend not readable", "path", p.save, "error", err)
		return nil, nil
	}
	var b strings.Builder
	var none []Table
	for _, name := range slices.Sorted(maps.Keys(now)) {
		s := now[name]
		if s.empty() {
			continue
		}
		none = append(none, Table{Name: name})
		b.WriteString(Table{Name: name}.script(s))
		where := strings.TrimSuffix(filepath.Base(p.restore), "-restore") + ": table " + name + ": "
		for _, ref := range s.refs {
			removed = append(removed, where+"rule "+ref)
		}
		for _, chain := range s.names() {
			removed = append(removed, where+"chain "+chain)
		}
	}
	if b.Len() == 0 {
		return nil, nil
	}
	if err := p.change(ctx, b.String(), none, now); err != nil {
		return nil, fmt.Errorf("remove rules: %w", err)
	}
	return removed, nil
}
