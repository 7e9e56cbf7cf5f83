package iptables

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// setChange is a change of sets that can still be taken back: a swapped set's
// former content is kept until then under its name and "-new".
type setChange struct {
	swapped, created []string
}

func asideName(name string) string { return name + "-new" }

// change makes the sets of rules to come. Sets that they don't name stay until
// the rules that name them are gone: see discard.
func (c *setChange) change(f Family, wanted []Set) error {
	for _, s := range wanted {
		now, exists, err := readSet(s.Name)
		if err != nil {
			return err
		}
		if exists && (now.typ != setType || now.family != f.netlink()) {
			return hint(fmt.Errorf("set %s: another program's, of type %s where %s is needed", s.Name, now.typ, setType),
				fmt.Sprintf("rename or destroy it: ipset rename %s OTHER", s.Name))
		}
		if exists && now.holds(s.Prefixes) {
			continue
		}
		if err := c.replace(f, s, exists); err != nil {
			return fmt.Errorf("set %s: %w", s.Name, err)
		}
	}
	return nil
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
