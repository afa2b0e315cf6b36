"""Rides: branches that find many solutions of a game, beside descents that get as many gradients.

`ride` (``python -m nestopt_ext ride --game ...``) is `nestopt_ext.games.ridge_rider` on games whose solutions are
known: toy games of two players, from where neighbours part fastest; a polynomial and a network, along the ridges of a
saddle; a small GAN. Rivals are plain descents: from the same starts, from the places of branching with noise in place
of directions, and from random starts, the last two with as many gradient evaluations as the whole ride took.

What to expect with the default settings (solutions are told apart by losses, position, features or modes):

=====================  ===============================================  ================================================
game, seed             the ride                                         descents for as many gradients
=====================  ===============================================  ================================================
small-ipd, 0, 1, 2     tit-for-tat and defection both from each of 10   one solution per start; noise or random starts
                       starts (with --lr 5 too)                         find both too (250 descents)
mix, 0                 far corner from 10 starts, spiral from 8 of      both in 432 random starts; gradient descent from
                       10; two or more from each start                  the same starts: spiral from 1 of 10
matching-pennies, 0    even odds at the end of 119 of 120 branches,     gradient descent goes round, and never gets
                       with extragradient                               there
random-subspace-ipd,   4 solutions, two or more from 9 of 10 starts     3 in 295 random starts, 4 with noise at the
0                                                                       branchings
ipd, 0                 with LOLA 7 solutions, two or more from each     gradient descent: defection alone; LOLA from the
                       of 10 starts                                     same starts: one; 1,042 random starts: 12
polynomial, --dim 10,  all 20 minima                                    noise at the saddle: 13, 11, 12 in 98 descents;
0, 1, 2                                                                 random starts: 18, 19, 19
shapes, 0, 1, 2        red, green and blue, one feature each, from      noise at the saddle: red in all of 27, 9, 9;
                       12, 6, 6 branches (seed 0: red with green too)   random starts: blue in 1 of 27, 0 of 9, 0 of 9
gan, 0, 1, 2           5, 7, 6 sets of modes in 8 branches              gradient descent: 1; noise in place of
                                                                        directions: 6, 7, 7 in 11
=====================  ===============================================  ================================================

So ridges find what descent from the saddle does not: no descent with noise of 45 has the blue feature, or the green
one, and the shallow third of the minima is never reached. Random restarts do better than noise: of 45 one finds blue,
four green, two mixtures, and on the polynomial they miss a minimum or two; in games of two numbers they find as much,
and a ride says where the border is. On the GAN leading exponents are no better than random displacements of the same
length: any push at the start decides which modes are dropped, and covering none counts as a set.

The defaults of mix, polynomial and shapes were chosen on the seeds of the table, the others' are those of the sources.

Source: Parker-Holder et al., Ridge Rider (2020), with its study of coloured digits, and Lorraine et al., Lyapunov
exponents for diversity in differentiable games (2022); the polynomial, the pictures, the GAN and the measures are ours.
"""

from .config import RideConfig
from .results import RideResult
from .run import ride

__all__ = ["RideConfig", "RideResult", "ride"]
