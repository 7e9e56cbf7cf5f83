package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/policy"
)

// setChange is a change of sets that can still be taken back: a swapped set's
// former content is kept until then under its name and "-new".
//
// It goes in two steps where a prefix may move from one list to another, since a packet in
// between must find it in one of them: a connection that begins there would be masqueraded
// for all its life. First sets only grow, then, with the rules that name them, they shrink.
type setChange struct {
	swapped, created []string
	rest             []Set  // what is to be swapped when the rules are written
	step             func() // called after each write; for tests
}

func asideName(name string) string { return name + "-new" }

// difference is how a set is to change.
type difference struct {
	Set
	exists, right bool
	plain         bool           // no entry has a flag
	union         []netip.Prefix // of what it holds and what it is to hold
	gains, loses  bool
}

// change makes the sets of rules to come; newRules tells whether other rules follow. Sets
// that they don't name stay until the rules that name them are gone: see discard.
func (c *setChange) change(f Family, wanted []Set, newRules bool) error {
	var list []difference
	gaining := 0
	for _, s := range wanted {
		d, err := compareSet(f, s)
		if err != nil {
			return err
		}
		if d.gains {
			gaining++
		}
		list = append(list, d)
	}
	for _, d := range list {
		if d.right {
			continue
		}
		others := gaining
		if d.gains {
			others--
		}
		now := d.Set
		if d.exists && d.loses && (newRules || others > 0) {
			now.Prefixes = d.union
			c.rest = append(c.rest, d.Set)
		}
		if !d.gains && len(now.Prefixes) == len(d.union) && d.plain {
			continue // it shrinks only
		}
		if err := c.replace(f, now, d.exists); err != nil {
			return fmt.Errorf("set %s: %w", d.Name, err)
		}
	}
	return nil
}

// finish takes out of sets what no rule needs any more.
func (c *setChange) finish(f Family) error {
	for _, s := range c.rest {
		if err := c.replace(f, s, true); err != nil {
			return fmt.Errorf("set %s: %w", s.Name, err)
		}
	}
	c.rest = nil
	return nil
}

func compareSet(f Family, s Set) (d difference, err error) {
	now, exists, err := readSet(s.Name)
	if err != nil {
		return d, err
	}
	if exists && (now.typ != setType || now.family != f.netlink()) {
		return d, advice.New(fmt.Errorf("set %s: another program's, of type %s where %s is needed", s.Name, now.typ, setType),
			fmt.Sprintf("rename or destroy it: ipset rename %s OTHER", s.Name))
	}
	d = difference{Set: s, exists: exists, right: exists && now.holds(s.Prefixes), plain: now.strange == 0}
	d.union = slices.Concat(now.Prefixes, s.Prefixes)
	slices.SortFunc(d.union, policy.ComparePrefixes)
	d.union = slices.Compact(d.union)
	d.gains, d.loses = len(d.union) > len(now.Prefixes), len(d.union) > len(s.Prefixes)
	return d, nil
}

func (c *setChange) stepped() {
	if c.step != nil {
		c.step()
	}
}

// replace builds the set aside, so that nobody ever sees half of it.
func (c *setChange) replace(f Family, s Set, exists bool) error {
	aside := asideName(s.Name)
	if err := destroySet(aside); err != nil { // left by a crash
		return err
	}
	if err := createSet(aside, f, len(s.Prefixes)); err != nil {
		return err
	}
	err := fillSet(aside, s.Prefixes)
	if err == nil && !exists {
		// Nothing refers to it: it may be empty for a moment.
		err = createSet(s.Name, f, 0)
	}
	if err == nil {
		err = swapSets(aside, s.Name)
	}
	if err != nil {
		return errors.Join(err, destroySet(aside))
	}
	if exists {
		c.swapped = append(c.swapped, s.Name)
	} else {
		c.created = append(c.created, s.Name)
	}
	c.stepped()
	return nil
}

// undo takes the change back, as far as no rule holds what it made.
func (c *setChange) undo() error {
	var errs []error
	for _, name := range c.swapped {
		errs = append(errs, swapSets(asideName(name), name), destroySet(asideName(name)))
	}
	for _, name := range c.created {
		errs = append(errs, destroySet(name), destroySet(asideName(name)))
	}
	return errors.Join(errs...)
}

// discard destroys what no rule of the family refers to any more.
func discard(f Family, wanted []Set) ([]string, error) {
	names, err := setNames()
	if err != nil {
		return nil, err
	}
	var gone []string
	var errs []error
	for _, name := range names {
		ours := strings.HasSuffix(strings.TrimSuffix(name, "-new"), fmt.Sprintf("-%d", int(f)))
		if !ours || slices.ContainsFunc(wanted, func(s Set) bool { return s.Name == name }) {
			continue
		}
		if err := destroySet(name); err != nil {
			errs = append(errs, fmt.Errorf("set %s: %w", name, err))
			continue
		}
		gone = append(gone, name)
	}
	return gone, errors.Join(errs...)
}

// checkSets says which set is not as wanted.
func checkSets(wanted []Set) (string, error) {
	for _, s := range wanted {
		now, ok, err := readSet(s.Name)
		switch {
		case err != nil:
			return "", err
		case !ok:
			return fmt.Sprintf("set %s is gone", s.Name), nil
		case !now.holds(s.Prefixes):
			return fmt.Sprintf("set %s was changed", s.Name), nil
		}
	}
	return "", nil
}
